#pragma once

#include <cstdint>

namespace driftar::cpu {

// The widest vector of any instruction set, in elements of T: buffers padded to it suit all of
// them.
template <typename T>
constexpr int64_t padding = 64 / sizeof(T);

template <typename T>
constexpr int64_t padded(int64_t count) {
  return (count + padding<T> - 1) / padding<T> * padding<T>;
}

}  // namespace driftar::cpu
