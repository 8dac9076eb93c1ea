#pragma once

// Tensors as the copy engine of Hopper sees them.

#include "attention.h"

#include <cuda.h>
#include <cuda_runtime.h>

namespace driftar::cuda {

constexpr int kPanel = 64;  // columns of 16 bits in a swizzled row of 128 bytes

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking the driver.
inline EncodeTiled encode_tiled() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    constexpr unsigned kSinceVersion = 12000;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, kSinceVersion, cudaEnableDefault, &status);
    const bool there = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<EncodeTiled>(found) : nullptr;
  }();
  return function;
}

// Describes an operand [B, key heads * group, length, columns] of 16 bits for boxes of kPanel
// columns and `rows` rows of all heads of a group. Coordinates: column, head of the group, row, key
// head, sample.
inline cudaError_t describe(CUtensorMap& map, const AttentionForward& call, const Operand& x,
                            int columns, int64_t group, int64_t length, int64_t rows) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  // A dimension of size 1 may have any stride, also one that the engine refuses.
  const auto bytes = [](int64_t count, int64_t stride) {
    return static_cast<cuuint64_t>(count == 1 ? 16 : stride * 2);
  };
  const cuuint64_t sizes[5] = {size(columns), size(group), size(length), size(call.key_heads),
                               size(call.batch)};
  const cuuint64_t strides[4] = {bytes(group, x.head), bytes(length, x.row),
                                 bytes(call.key_heads, group * x.head), bytes(call.batch, x.batch)};
  const cuuint32_t box[5] = {kPanel, static_cast<cuuint32_t>(group), static_cast<cuuint32_t>(rows),
                             1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&map,
             call.type == Scalar::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             5, const_cast<void*>(x.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace driftar::cuda
