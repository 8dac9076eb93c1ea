#pragma once

// Numbers as they lie in memory and as kernels compute with them (fp32).

#include "ptx.cuh"
#include "scalar.h"

#include <cstdint>

namespace driftar::cuda {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(Bf16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(Fp16 value) { return ptx::widen_fp16(value.bits); }

// Two values as one register of type T, rounded to nearest; `low` lies first in memory.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
  return ptx::pack_bf16(low, high);
}
template <>
__device__ __forceinline__ uint32_t pack<Fp16>(float low, float high) {
  return ptx::pack_fp16(low, high);
}

template <typename T>
__device__ __forceinline__ T narrow(float value) {
  return {static_cast<uint16_t>(pack<T>(value, 0.0f))};
}
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls visit(TypeTag<T>{}) with the type that `scalar` names.
template <typename Visitor>
decltype(auto) dispatch(Scalar scalar, Visitor&& visit) {
  switch (scalar) {
    case Scalar::fp32:
      return visit(TypeTag<float>{});
    case Scalar::bf16:
      return visit(TypeTag<Bf16>{});
    default:
      return visit(TypeTag<Fp16>{});
  }
}

}  // namespace driftar::cuda
