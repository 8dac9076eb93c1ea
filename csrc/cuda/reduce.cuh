#pragma once

// Reductions over a warp or a block, in an order that does not depend on the run.

#include "launch.cuh"

namespace driftar::cuda {

template <typename T, typename Join>
__device__ __forceinline__ T warp_reduce(T value, Join&& join) {
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    value = join(value, __shfl_xor_sync(kWholeWarp, value, bits));
  }
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

// Every thread of the block gets the result; `of_warps` is shared memory for one value per warp,
// and nobody may still be using it.
template <int threads, typename T, typename Join>
__device__ __forceinline__ T block_reduce(T value, T* of_warps, Join&& join) {
  value = warp_reduce(value, join);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warps[0];
#pragma unroll
  for (int warp = 1; warp < threads / kWarp; ++warp) value = join(value, of_warps[warp]);
  return value;
}

}  // namespace driftar::cuda
