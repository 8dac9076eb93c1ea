#pragma once

// The entropy-parameterised prior on the GPU as its launchers see it; all tensors are contiguous.

#include "../common/sigma_map.h"
#include "scalar.h"

#include <cuda_runtime.h>

#include <cstdint>

namespace driftar::cuda {

struct SigmaCall {
  SigmaMap map;
  int64_t count;
  Scalar type;
  const void* entropy;  // [count]
  const float* grad;    // [count], or null for the forward pass
  void* out;            // [count], sigma (fp32), or the gradient of the entropy
};

struct PriorCall {
  SigmaMap map;
  int64_t rows, width;
  Scalar type;
  const float* entropy;      // [rows]
  const void *mean, *noise;  // [rows, width]
  void* out;                 // [rows, width]
};

struct PriorBackwardCall {
  SigmaMap map;
  int64_t rows, width;
  Scalar type;
  const float* entropy;      // [rows]
  const void *grad, *noise;  // [rows, width]
  float* grad_entropy;       // [rows] or null
  void* grad_noise;          // [rows, width] or null
};

cudaError_t launch_entropy_to_sigma(const SigmaCall& call, cudaStream_t stream);
cudaError_t launch_entropy_prior(const PriorCall& call, cudaStream_t stream);
cudaError_t launch_entropy_prior_backward(const PriorBackwardCall& call, cudaStream_t stream);

}  // namespace driftar::cuda
