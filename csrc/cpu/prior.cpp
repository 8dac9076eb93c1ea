#include "prior.h"

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "parallel.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace driftar::cpu {

namespace {

using at::Tensor;

// Elements handled by one task: enough to outweigh starting it.
constexpr int64_t kTaskElements = 1 << 15;

SigmaMap sigma_map(double sigma_max, double tau, double entropy_max) {
  const double range = std::expm1(entropy_max / tau);
  return {sigma_max, tau, entropy_max, std::abs(range) < 1e-8 ? 1e-8 : range};
}

// Calls body(begin, end) on pieces of [0, count) of `piece` items each, in parallel.
template <typename Body>
void for_each_piece(int64_t count, int64_t piece, const Body& body) {
  parallel_for((count + piece - 1) / piece, [&](int64_t task, int64_t) {
    body(task * piece, std::min(count, (task + 1) * piece));
  });
}

Tensor entropy_to_sigma(const Tensor& entropy, double sigma_max, double tau, double entropy_max) {
  check_floating("entropy_to_sigma", "entropy", entropy);
  const Tensor values = entropy.contiguous();
  const Tensor sigma =
      at::empty(entropy.sizes(), entropy.options().dtype(accumulation_type(entropy.scalar_type())));
  const SigmaMap map = sigma_map(sigma_max, tau, entropy_max);
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

Tensor entropy_prior(const Tensor& mean, const Tensor& entropy, const Tensor& noise,
                     double sigma_max, double tau, double entropy_max) {
  const char* op = "entropy_prior";
  check_floating(op, "mean", mean);
  check_floating(op, "entropy", entropy);
  TORCH_CHECK_VALUE(mean.dim() >= 1, op, ": mean must have at least 1 dimension");
  check_like(op, "noise", noise, mean);
  check_shape(op, "noise", noise, mean.sizes());
  check_shape(op, "entropy", entropy, mean.sizes().slice(0, mean.dim() - 1));
  const Tensor means = mean.contiguous(), noises = noise.contiguous();
  const Tensor entropies = entropy.to(accumulation_type(mean.scalar_type())).contiguous();
  const Tensor out = at::empty(mean.sizes(), mean.options());
  if (out.numel() == 0) return out;
  dispatch_floating(mean.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const PriorCall<scalar_t> call{sigma_map(sigma_max, tau, entropy_max),
                                   mean.size(-1),
                                   entropies.const_data_ptr<accumulate_t<scalar_t>>(),
                                   means.const_data_ptr<scalar_t>(),
                                   noises.const_data_ptr<scalar_t>(),
                                   out.mutable_data_ptr<scalar_t>()};
    dispatch_isa([&](auto isa) {
      using Kernel = PriorKernel<decltype(isa)::value, scalar_t>;
      const int64_t piece = std::max<int64_t>(kTaskElements / call.width, 1);
      for_each_piece(entropies.numel(), piece,
                     [&](int64_t begin, int64_t end) { Kernel::sample(call, begin, end); });
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, CPU, library) {
  library.impl("entropy_to_sigma", &entropy_to_sigma);
  library.impl("entropy_prior", &entropy_prior);
}

}  // namespace driftar::cpu
