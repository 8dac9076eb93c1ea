#pragma once

// Large results in huge pages: a fresh tensor is faulted in page by page while it is written, and
// fewer pages mean fewer faults. Nothing else changes.

#include <ATen/ops/empty_cpu_dispatch.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace driftar::cpu {

inline at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor result = at::cpu::empty(sizes, options);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 1 << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + result.nbytes()) & ~(kHugePage - 1);
  if (result.nbytes() >= 2 * kHugePage && first < last) {
    // A refusal leaves ordinary pages.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return result;
}

}  // namespace driftar::cpu
