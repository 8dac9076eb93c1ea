#pragma once

// The one place where kernels are launched.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace driftar::cuda {

struct LaunchShape {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
};

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Blocks of `size` that cover `count`; fits grid.x, the only dimension of a grid without a small
// limit.
__host__ __device__ constexpr int64_t blocks_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// kernel(call) on `stream`; does nothing for an empty grid.
template <typename Call>
cudaError_t launch(void (*kernel)(Call), const LaunchShape& shape, cudaStream_t stream,
                   const std::type_identity_t<Call>& call) {
  if (shape.blocks == 0) return cudaSuccess;
#if defined(__CUDACC__)
  constexpr size_t kWithoutAsking = size_t{48} << 10;
  if (shape.shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(shape.blocks), shape.threads, shape.shared_bytes, stream>>>(call);
  return cudaGetLastError();
#else
  struct Bound {
    void (*kernel)(Call);
    const Call& call;
  } bound{kernel, call};
  const bool fine = emulator::launch(
      {static_cast<unsigned>(shape.blocks), 1, 1}, {static_cast<unsigned>(shape.threads), 1, 1},
      shape.shared_bytes,
      [](const void* argument) {
        const auto& given = *static_cast<const Bound*>(argument);
        given.kernel(given.call);
      },
      &bound);
  return fine ? cudaSuccess : cudaErrorLaunchFailure;
#endif
}

}  // namespace driftar::cuda
