#pragma once

// The entropy-parameterised prior on the CPU as its kernel sees it.

#include "../common/accumulate.h"
#include "../common/sigma_map.h"
#include "isa.h"

#include <cstdint>

namespace driftar::cpu {

template <typename scalar_t>
struct PriorCall {
  using acc_t = accumulate_t<scalar_t>;
  SigmaMap map;
  int64_t width;
  const acc_t* entropy;          // [rows]
  const scalar_t *mean, *noise;  // [rows, width]
  scalar_t* out;                 // [rows, width]
};

template <typename scalar_t>
struct PriorBackwardCall {
  using acc_t = accumulate_t<scalar_t>;
  SigmaMap map;
  int64_t width;
  const acc_t* entropy;          // [rows]
  const scalar_t *grad, *noise;  // [rows, width]
  acc_t* grad_entropy;           // [rows] or null
  scalar_t* grad_noise;          // [rows, width] or null
};

template <Isa isa, typename scalar_t>
struct PriorKernel {
  using acc_t = accumulate_t<scalar_t>;

  // sigma[begin, end) of entropy[begin, end)
  static void sigma(const SigmaMap& map, const scalar_t* entropy, int64_t begin, int64_t end,
                    acc_t* sigma);

  // grad_entropy[i] = grad[i] d sigma / d E, i in [begin, end)
  static void sigma_backward(const SigmaMap& map, const acc_t* grad, const scalar_t* entropy,
                             int64_t begin, int64_t end, scalar_t* grad_entropy);

  // out = mean + sigma(entropy) noise, rows [begin, end)
  static void sample(const PriorCall<scalar_t>& call, int64_t begin, int64_t end);

  // Gradients of entropy and noise, rows [begin, end)
  static void sample_backward(const PriorBackwardCall<scalar_t>& call, int64_t begin, int64_t end);
};

}  // namespace driftar::cpu
