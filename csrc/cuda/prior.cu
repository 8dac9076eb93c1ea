// The entropy-parameterised prior (docs/ops/prior.md): one pass over memory.

#include "prior.h"

#include "launch.cuh"
#include "numbers.cuh"
#include "reduce.cuh"

namespace driftar::cuda {

namespace {

constexpr int kThreads = 256;

// fp64, since for a small tau the exponentials leave the range of fp32; once per row or vector.
// Comparisons are written so that a NaN entropy stays NaN.
__device__ float sigma_of(const SigmaMap& map, float entropy) {
  const double e = entropy;
  const double clamped = e < 0 ? 0.0 : e > map.entropy_max ? map.entropy_max : e;
  const double sigma = map.sigma_max * expm1(clamped / map.tau) / map.range;
  return static_cast<float>(sigma < 0 ? 0.0 : sigma > map.sigma_max ? map.sigma_max : sigma);
}

// d sigma / d E; 0 where E is clamped.
__device__ float slope_of(const SigmaMap& map, float entropy) {
  const double e = entropy;
  const bool inside = e >= 0 && e <= map.entropy_max;
  const double slope = map.sigma_max / (map.tau * map.range) * exp((inside ? e : 0.0) / map.tau);
  return inside ? static_cast<float>(slope) : 0.0f;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sigma_kernel(const SigmaCall call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= call.count) return;
  const float entropy = widen(static_cast<const T*>(call.entropy)[i]);
  if (call.grad == nullptr) {
    static_cast<float*>(call.out)[i] = sigma_of(call.map, entropy);
  } else {
    static_cast<T*>(call.out)[i] = narrow<T>(call.grad[i] * slope_of(call.map, entropy));
  }
}

// `count` consecutive values, moved as one.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T values[count];
};

// A thread samples `count` consecutive values of a row.
template <typename T, int count>
__global__ void __launch_bounds__(kThreads) prior_kernel(const PriorCall call) {
  using Values = Pack<T, count>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at * count >= call.rows * call.width) return;
  const float sigma = sigma_of(call.map, call.entropy[at * count / call.width]);
  const Values mean = static_cast<const Values*>(call.mean)[at];
  const Values noise = static_cast<const Values*>(call.noise)[at];
  Values out;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    out.values[i] = narrow<T>(widen(mean.values[i]) + sigma * widen(noise.values[i]));
  }
  static_cast<Values*>(call.out)[at] = out;
}

// A warp differentiates a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) prior_backward_kernel(const PriorBackwardCall call) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= call.rows) return;
  const T* grad = static_cast<const T*>(call.grad) + row * call.width;
  const T* noise = static_cast<const T*>(call.noise) + row * call.width;
  if (call.grad_entropy != nullptr) {
    float product = 0;
    for (int64_t c = lane; c < call.width; c += kWarp) product += widen(grad[c]) * widen(noise[c]);
    product = warp_sum(product);
    if (lane == 0) call.grad_entropy[row] = product * slope_of(call.map, call.entropy[row]);
  }
  if (call.grad_noise != nullptr) {
    T* out = static_cast<T*>(call.grad_noise) + row * call.width;
    const float sigma = sigma_of(call.map, call.entropy[row]);
    for (int64_t c = lane; c < call.width; c += kWarp) out[c] = narrow<T>(widen(grad[c]) * sigma);
  }
}

bool aligned_to(int64_t bytes, const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace

cudaError_t launch_entropy_to_sigma(const SigmaCall& call, cudaStream_t stream) {
  return dispatch(call.type, [&](auto tag) {
    return launch(sigma_kernel<typename decltype(tag)::type>,
                  {blocks_of(call.count, kThreads), kThreads}, stream, call);
  });
}

cudaError_t launch_entropy_prior(const PriorCall& call, cudaStream_t stream) {
  return dispatch(call.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kCount = 16 / sizeof(T);
    const int64_t values = call.rows * call.width;
    const bool together = call.width % kCount == 0 && aligned_to(16, call.mean) &&
                          aligned_to(16, call.noise) && aligned_to(16, call.out);
    return together
               ? launch(prior_kernel<T, kCount>, {blocks_of(values / kCount, kThreads), kThreads},
                        stream, call)
               : launch(prior_kernel<T, 1>, {blocks_of(values, kThreads), kThreads}, stream, call);
  });
}

cudaError_t launch_entropy_prior_backward(const PriorBackwardCall& call, cudaStream_t stream) {
  return dispatch(call.type, [&](auto tag) {
    return launch(prior_backward_kernel<typename decltype(tag)::type>,
                  {blocks_of(call.rows, kThreads / kWarp), kThreads}, stream, call);
  });
}

}  // namespace driftar::cuda
