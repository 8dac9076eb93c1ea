#pragma once

// Memory of large tensors: in huge pages, and from the blocks that earlier ones gave back.

#include <ATen/core/Tensor.h>

namespace driftar::cpu {

// An uninitialised tensor. From kLargeBytes on its memory may have served another one before, and
// when it is freed, goes back to a store of at most DRIFTAR_KERNELS_CACHE_MB.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

constexpr size_t kLargeBytes = 1 << 20;

}  // namespace driftar::cpu
