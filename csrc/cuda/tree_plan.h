#pragma once

// What the host decides about the tree kernels: plain C++, so that any machine can test it.

#include <algorithm>
#include <cstdint>

namespace driftar::cuda {

// Nodes of a tree, whose states lie in shared memory.
constexpr int64_t kMaxNodes = 4096;

// One cache [B, H, Lmax, D] of any dtype; strides and widths in bytes.
struct Cache {
  void* data;
  int64_t width, element, batch, head, row, column;
};

// Bytes that a thread moves at once: as many as strides and alignment allow.
inline int64_t copy_unit(const Cache& cache) {
  if (cache.column != cache.element) return cache.element;
  const int64_t common = static_cast<int64_t>(reinterpret_cast<uintptr_t>(cache.data)) |
                         cache.width | cache.batch | cache.head | cache.row;
  return std::min<int64_t>(common & -common, 16);
}

}  // namespace driftar::cuda
