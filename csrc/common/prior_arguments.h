#pragma once

// What the prior's operators ask of their arguments on every device.

#include "checks.h"

namespace driftar {

// grad is of sigma.
inline void check_sigma_gradient(const char* op, const at::Tensor& grad,
                                 const at::Tensor& entropy) {
  check_floating(op, "entropy", entropy);
  check_statistic(op, "grad", grad, entropy);
  check_shape(op, "grad", grad, entropy.sizes());
}

// `like`, the mean or its gradient [..., D], noise [..., D], entropy [...].
inline void check_prior(const char* op, const char* name, const at::Tensor& like,
                        const at::Tensor& entropy, const at::Tensor& noise) {
  check_floating(op, name, like);
  check_floating(op, "entropy", entropy);
  TORCH_CHECK_VALUE(like.dim() >= 1, op, ": ", name, " must have at least 1 dimension");
  check_like(op, "noise", noise, like);
  check_shape(op, "noise", noise, like.sizes());
  check_shape(op, "entropy", entropy, like.sizes().slice(0, like.dim() - 1));
  check_device(op, "entropy", entropy, like);
}

}  // namespace driftar
