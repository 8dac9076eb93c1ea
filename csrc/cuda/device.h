#pragma once

// What the bindings share: dtypes, the device and stream of a call, launch errors.

#include "scalar.h"

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

// The emulator of the tests runs the same bindings on CPU tensors.
#ifndef DRIFTAR_CUDA_KEY
#define DRIFTAR_CUDA_KEY CUDA
#endif

namespace driftar::cuda {

inline Scalar scalar_of(const char* op, const char* name, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Scalar::fp32;
    case at::kBFloat16:
      return Scalar::bf16;
    case at::kHalf:
      return Scalar::fp16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name, " must be fp32, bf16 or fp16 on this backend, got ",
                       x.scalar_type());
  }
}

// Whether rows can be copied 16 aligned bytes at a time.
inline bool moves_in_vectors(const at::Tensor& x) {
  auto common = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.const_data_ptr()));
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    common |= x.stride(d) * static_cast<int64_t>(x.element_size());
  }
  return x.stride(-1) == 1 && common % 16 == 0;
}

// Makes the device of a tensor current for as long as it lives.
class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& x) : guard_(x.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(); }

 private:
  c10::cuda::CUDAGuard guard_;
};

inline void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Of the device of a tensor.
inline int device_attribute(const char* op, const at::Tensor& x, cudaDeviceAttr attribute) {
  int value = 0;
  check_launch(op, cudaDeviceGetAttribute(&value, attribute, std::max<int>(x.device().index(), 0)));
  return value;
}

}  // namespace driftar::cuda
