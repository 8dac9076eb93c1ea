#pragma once

// The part of the CUDA runtime and language that the kernels use, on the emulator.

#include "../emulator.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using dim3 = driftar::emulator::Index;

#define threadIdx (::driftar::emulator::place().thread)
#define blockIdx (::driftar::emulator::place().block)
#define blockDim (::driftar::emulator::place().block_size)
#define gridDim (::driftar::emulator::place().grid_size)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801
};
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return driftar::emulator::fault_message();
  return error == cudaSuccess ? "no error" : "an invalid or unsupported argument";
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = driftar::emulator::capability();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;  // few, so that small tests meet one split of the keys and several
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 163 << 10;
  }
  return cudaSuccess;
}

enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1
};
// Knows the functions of the driver that the emulator has.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);

[[noreturn]] inline void __trap() { driftar::emulator::fault("a trap"); }

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  driftar::emulator::block_barrier(where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       std::source_location where = std::source_location::current()) {
  driftar::emulator::meet_warp(mask, nullptr, [](void* const*, unsigned) {}, where);
}

namespace driftar::emulator {

template <typename T>
struct Shuffle {
  T value, result;
  unsigned source;
};

// Every lane receives the value of lane `source` (its own where that lane takes no part).
template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const std::source_location& where) {
  static_assert(std::is_trivially_copyable_v<T>);
  Shuffle<T> deposit{value, value, source};
  meet_warp(
      mask, &deposit,
      [](void* const* deposits, unsigned lanes) {
        for (unsigned i = 0; i < 32; ++i) {
          if (!(lanes >> i & 1u)) continue;
          auto* own = static_cast<Shuffle<T>*>(deposits[i]);
          if (own->source >= 32 || !(lanes >> own->source & 1u)) continue;
          own->result = static_cast<Shuffle<T>*>(deposits[own->source])->value;
        }
      },
      where);
  return deposit.result;
}

inline unsigned lane() { return place().thread.x % 32; }

}  // namespace driftar::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source,
              std::source_location where = std::source_location::current()) {
  return driftar::emulator::shuffle(mask, value, static_cast<unsigned>(source) % 32, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits,
                  std::source_location where = std::source_location::current()) {
  return driftar::emulator::shuffle(mask, value,
                                    driftar::emulator::lane() ^ static_cast<unsigned>(bits), where);
}

inline unsigned __ballot_sync(unsigned mask, bool vote,
                              std::source_location where = std::source_location::current()) {
  struct Vote {
    bool vote;
    unsigned result;
  } deposit{vote, 0};
  driftar::emulator::meet_warp(
      mask, &deposit,
      [](void* const* deposits, unsigned lanes) {
        unsigned result = 0;
        for (unsigned i = 0; i < 32; ++i) {
          if ((lanes >> i & 1u) && static_cast<Vote*>(deposits[i])->vote) result |= 1u << i;
        }
        for (unsigned i = 0; i < 32; ++i) {
          if (lanes >> i & 1u) static_cast<Vote*>(deposits[i])->result = result;
        }
      },
      where);
  return deposit.result;
}

inline bool __any_sync(unsigned mask, bool vote,
                       std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}

using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
