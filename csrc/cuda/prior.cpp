#include "prior.h"

#include "../common/prior_arguments.h"
#include "device.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

namespace driftar::cuda {

namespace {

using at::Tensor;

Tensor entropy_to_sigma(const Tensor& entropy, double sigma_max, double tau, double entropy_max) {
  const char* op = "entropy_to_sigma";
  const Scalar type = scalar_of(op, "entropy", entropy);
  const Tensor values = entropy.contiguous();
  const Tensor sigma = at::empty(entropy.sizes(), entropy.options().dtype(at::kFloat));
  const DeviceScope scope(entropy);
  check_launch(op,
               launch_entropy_to_sigma({SigmaMap(sigma_max, tau, entropy_max), values.numel(), type,
                                        values.const_data_ptr(), nullptr, sigma.mutable_data_ptr()},
                                       scope.stream()));
  return sigma;
}

Tensor entropy_to_sigma_backward(const Tensor& grad, const Tensor& entropy, double sigma_max,
                                 double tau, double entropy_max) {
  const char* op = "entropy_to_sigma_backward";
  check_sigma_gradient(op, grad, entropy);
  const Scalar type = scalar_of(op, "entropy", entropy);
  const Tensor values = entropy.contiguous(), grads = grad.contiguous();
  const Tensor result = at::empty(entropy.sizes(), entropy.options());
  const DeviceScope scope(entropy);
  check_launch(
      op, launch_entropy_to_sigma(
              {SigmaMap(sigma_max, tau, entropy_max), values.numel(), type, values.const_data_ptr(),
               grads.const_data_ptr<float>(), result.mutable_data_ptr()},
              scope.stream()));
  return result;
}

Tensor entropy_prior(const Tensor& mean, const Tensor& entropy, const Tensor& noise,
                     double sigma_max, double tau, double entropy_max) {
  const char* op = "entropy_prior";
  check_prior(op, "mean", mean, entropy, noise);
  const Scalar type = scalar_of(op, "mean", mean);
  const Tensor means = mean.contiguous(), noises = noise.contiguous();
  const Tensor entropies = entropy.to(at::kFloat).contiguous();
  const Tensor out = at::empty(mean.sizes(), mean.options());
  const DeviceScope scope(mean);
  check_launch(op, launch_entropy_prior(
                       {SigmaMap(sigma_max, tau, entropy_max), entropies.numel(), mean.size(-1),
                        type, entropies.const_data_ptr<float>(), means.const_data_ptr(),
                        noises.const_data_ptr(), out.mutable_data_ptr()},
                       scope.stream()));
  return out;
}

std::tuple<Tensor, Tensor> entropy_prior_backward(const Tensor& grad, const Tensor& entropy,
                                                  const Tensor& noise, double sigma_max, double tau,
                                                  double entropy_max, bool need_entropy,
                                                  bool need_noise) {
  const char* op = "entropy_prior_backward";
  check_prior(op, "grad", grad, entropy, noise);
  const Scalar type = scalar_of(op, "grad", grad);
  const Tensor grads = grad.contiguous(), noises = noise.contiguous();
  const Tensor entropies = entropy.to(at::kFloat).contiguous();
  const Tensor grad_entropy = need_entropy ? at::empty(entropy.sizes(), entropies.options())
                                           : at::empty({0}, entropies.options());
  const Tensor grad_noise =
      need_noise ? at::empty(grad.sizes(), grad.options()) : at::empty({0}, grad.options());
  const DeviceScope scope(grad);
  check_launch(
      op, launch_entropy_prior_backward(
              {SigmaMap(sigma_max, tau, entropy_max), entropies.numel(), grad.size(-1), type,
               entropies.const_data_ptr<float>(), grads.const_data_ptr(), noises.const_data_ptr(),
               need_entropy ? grad_entropy.mutable_data_ptr<float>() : nullptr,
               need_noise ? grad_noise.mutable_data_ptr() : nullptr},
              scope.stream()));
  return {grad_entropy.to(entropy.scalar_type()), grad_noise};
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, DRIFTAR_CUDA_KEY, library) {
  library.impl("entropy_to_sigma", &entropy_to_sigma);
  library.impl("entropy_to_sigma_backward", &entropy_to_sigma_backward);
  library.impl("entropy_prior", &entropy_prior);
  library.impl("entropy_prior_backward", &entropy_prior_backward);
}

}  // namespace driftar::cuda
