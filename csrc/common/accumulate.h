#pragma once

namespace driftar {

// Type in which a kernel accumulates values stored as T: fp32, but fp64 for fp64.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace driftar
