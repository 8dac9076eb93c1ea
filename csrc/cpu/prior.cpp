#include "prior.h"

#include "../common/dispatch.h"
#include "../common/prior_arguments.h"
#include "large_blocks.h"
#include "parallel.h"

#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace driftar::cpu {

namespace {

using at::Tensor;

// Elements handled by one task: enough to outweigh starting it.
constexpr int64_t kTaskElements = 1 << 15;

Tensor entropy_to_sigma(const Tensor& entropy, double sigma_max, double tau, double entropy_max) {
  check_floating("entropy_to_sigma", "entropy", entropy);
  const Tensor values = entropy.contiguous();
  const Tensor sigma = at::cpu::empty(
      entropy.sizes(), entropy.options().dtype(accumulation_type(entropy.scalar_type())));
  const SigmaMap map(sigma_max, tau, entropy_max);
  dispatch_floating(entropy.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const scalar_t* in = values.const_data_ptr<scalar_t>();
    auto* out = sigma.mutable_data_ptr<accumulate_t<scalar_t>>();
    dispatch_isa([&](auto isa) {
      using Kernel = PriorKernel<decltype(isa)::value, scalar_t>;
      for_each_piece(values.numel(), kTaskElements,
                     [&](int64_t begin, int64_t end) { Kernel::sigma(map, in, begin, end, out); });
    });
  });
  return sigma;
}

Tensor entropy_to_sigma_backward(const Tensor& grad, const Tensor& entropy, double sigma_max,
                                 double tau, double entropy_max) {
  const char* op = "entropy_to_sigma_backward";
  check_sigma_gradient(op, grad, entropy);
  const Tensor values = entropy.contiguous(), grads = grad.contiguous();
  const Tensor result = at::cpu::empty(entropy.sizes(), entropy.options());
  const SigmaMap map(sigma_max, tau, entropy_max);
  dispatch_floating(entropy.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto* in = grads.const_data_ptr<accumulate_t<scalar_t>>();
    const scalar_t* at = values.const_data_ptr<scalar_t>();
    scalar_t* out = result.mutable_data_ptr<scalar_t>();
    dispatch_isa([&](auto isa) {
      using Kernel = PriorKernel<decltype(isa)::value, scalar_t>;
      for_each_piece(values.numel(), kTaskElements, [&](int64_t begin, int64_t end) {
        Kernel::sigma_backward(map, in, at, begin, end, out);
      });
    });
  });
  return result;
}

// Rows handled by one task.
int64_t rows_per_task(int64_t width) {
  return std::max<int64_t>(kTaskElements / std::max<int64_t>(width, 1), 1);
}

Tensor entropy_prior(const Tensor& mean, const Tensor& entropy, const Tensor& noise,
                     double sigma_max, double tau, double entropy_max) {
  const char* op = "entropy_prior";
  check_prior(op, "mean", mean, entropy, noise);
  const Tensor means = mean.contiguous(), noises = noise.contiguous();
  const Tensor entropies = entropy.to(accumulation_type(mean.scalar_type())).contiguous();
  const Tensor out = empty_large(mean.sizes(), mean.options());
  if (out.numel() == 0) return out;
  dispatch_floating(mean.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const PriorCall<scalar_t> call{SigmaMap(sigma_max, tau, entropy_max),
                                   mean.size(-1),
                                   entropies.const_data_ptr<accumulate_t<scalar_t>>(),
                                   means.const_data_ptr<scalar_t>(),
                                   noises.const_data_ptr<scalar_t>(),
                                   out.mutable_data_ptr<scalar_t>()};
    dispatch_isa([&](auto isa) {
      using Kernel = PriorKernel<decltype(isa)::value, scalar_t>;
      for_each_piece(entropies.numel(), rows_per_task(call.width),
                     [&](int64_t begin, int64_t end) { Kernel::sample(call, begin, end); });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> entropy_prior_backward(const Tensor& grad, const Tensor& entropy,
                                                  const Tensor& noise, double sigma_max, double tau,
                                                  double entropy_max, bool need_entropy,
                                                  bool need_noise) {
  const char* op = "entropy_prior_backward";
  check_prior(op, "grad", grad, entropy, noise);
  const Tensor grads = grad.contiguous(), noises = noise.contiguous();
  const Tensor entropies = entropy.to(accumulation_type(grad.scalar_type())).contiguous();
  const Tensor grad_entropy = need_entropy ? at::cpu::empty(entropy.sizes(), entropies.options())
                                           : at::cpu::empty({0}, entropies.options());
  const Tensor grad_noise =
      need_noise ? empty_large(grad.sizes(), grad.options()) : at::cpu::empty({0}, grad.options());
  dispatch_floating(grad.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const PriorBackwardCall<scalar_t> call{
        SigmaMap(sigma_max, tau, entropy_max),
        grad.size(-1),
        entropies.const_data_ptr<accumulate_t<scalar_t>>(),
        grads.const_data_ptr<scalar_t>(),
        noises.const_data_ptr<scalar_t>(),
        need_entropy ? grad_entropy.mutable_data_ptr<accumulate_t<scalar_t>>() : nullptr,
        need_noise ? grad_noise.mutable_data_ptr<scalar_t>() : nullptr};
    dispatch_isa([&](auto isa) {
      using Kernel = PriorKernel<decltype(isa)::value, scalar_t>;
      for_each_piece(entropies.numel(), rows_per_task(call.width), [&](int64_t begin, int64_t end) {
        Kernel::sample_backward(call, begin, end);
      });
    });
  });
  return {grad_entropy.to(entropy.scalar_type()), grad_noise};
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, CPU, library) {
  library.impl("entropy_to_sigma", &entropy_to_sigma);
  library.impl("entropy_to_sigma_backward", &entropy_to_sigma_backward);
  library.impl("entropy_prior", &entropy_prior);
  library.impl("entropy_prior_backward", &entropy_prior_backward);
}

}  // namespace driftar::cpu
