#include "drift_passes.h"

#include "../common/dispatch.h"
#include "../common/drift_arguments.h"
#include "large_blocks.h"

#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace driftar::cpu {

namespace {

using at::Tensor;
using std::optional;

// MIN_MEAN_SQUARE of the reference.
constexpr double kMinMeanSquare = 1e-8;

std::vector<double> doubles(const Tensor& x) {
  const Tensor wide = x.to(at::kDouble).contiguous();
  const double* data = wide.const_data_ptr<double>();
  return {data, data + wide.numel()};
}

std::tuple<Tensor, Tensor> drift_distances(const Tensor& gen, const Tensor& pos,
                                           const optional<Tensor>& neg, const Tensor& weight,
                                           bool keep) {
  check_drift_points("drift_distances", gen, pos, neg, weight);
  const auto found = weighted_distances({gen, pos, neg, weight.contiguous()}, keep, 0);
  const Tensor sums =
      at::tensor({found.total, weight.sum(at::kDouble).item<double>()}, at::kDouble);
  return {found.values, sums.to(weight.scalar_type())};
}

std::tuple<Tensor, Tensor> drift_force(const Tensor& gen, const Tensor& pos,
                                       const optional<Tensor>& neg, const Tensor& weight,
                                       const Tensor& distances, const Tensor& scale,
                                       at::ArrayRef<double> temperatures) {
  check_drift_points("drift_force", gen, pos, neg, weight);
  check_drift_statistics("drift_force", gen, weight, distances, scale, temperatures);
  const auto [force, squares] =
      raw_forces({gen, pos, neg, weight.contiguous()},
                 {distances.contiguous(), scale.item<double>(), temperatures});
  return {force, at::tensor(squares, at::kDouble).to(weight.scalar_type())};
}

std::tuple<Tensor, Tensor> drift_squares(const Tensor& gen, const Tensor& pos,
                                         const optional<Tensor>& neg, const Tensor& weight,
                                         const Tensor& distances, const Tensor& scale,
                                         at::ArrayRef<double> temperatures) {
  check_drift_points("drift_squares", gen, pos, neg, weight);
  check_drift_statistics("drift_squares", gen, weight, distances, scale, temperatures);
  const Tensor balances =
      at::cpu::empty(balance_shape(gen, weight, temperatures), weight.options());
  const std::vector<double> squares = many_squares(
      {gen, pos, neg, weight.contiguous()},
      {distances.contiguous(), scale.item<double>(), temperatures}, /*grams=*/{}, balances);
  return {at::tensor(squares, at::kDouble).to(weight.scalar_type()), balances};
}

std::tuple<Tensor, Tensor> drift_combined_force(const Tensor& gen, const Tensor& pos,
                                                const optional<Tensor>& neg, const Tensor& weight,
                                                const Tensor& distances, const Tensor& scale,
                                                at::ArrayRef<double> temperatures,
                                                const Tensor& balances, const Tensor& factors) {
  const char* op = "drift_combined_force";
  check_drift_points(op, gen, pos, neg, weight);
  check_drift_statistics(op, gen, weight, distances, scale, temperatures);
  check_drift_balances(op, gen, weight, temperatures, balances, factors);
  const auto [force, squares] =
      many_forces({gen, pos, neg, weight.contiguous()},
                  {distances.contiguous(), scale.item<double>(), temperatures},
                  balances.contiguous(), doubles(factors));
  return {force, at::tensor(squares, at::kDouble).to(weight.scalar_type())};
}

template <typename Value>
Tensor tensor_of(at::IntArrayRef sizes, const at::TensorOptions& options, const Value& value) {
  const Tensor result = at::cpu::empty(sizes, options);
  dispatch_floating(result.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* data = result.mutable_data_ptr<T>();
    for (int64_t i = 0; i < result.numel(); ++i) data[i] = static_cast<T>(value(i));
  });
  return result;
}

// The whole field of one process: a small call costs what its calls into PyTorch cost, and passes
// can leave more to each other.
std::tuple<Tensor, Tensor, Tensor, Tensor> drift_field(const Tensor& gen, const Tensor& pos,
                                                       const optional<Tensor>& neg,
                                                       const optional<Tensor>& weight, bool keep,
                                                       at::ArrayRef<double> temperatures) {
  const char* op = "drift_field";
  if (weight) {
    check_drift_points(op, gen, pos, neg, *weight);
  } else {
    check_drift_points(op, gen, pos, neg);
  }
  check_temperatures(op, temperatures);
  const int64_t batch = gen.size(0), count = static_cast<int64_t>(temperatures.size());
  const auto options = gen.options().dtype(accumulation_type(gen.scalar_type()));
  const auto one = [](int64_t) { return 1; };
  const std::vector<int64_t> all = {batch, drift_point_count(gen, pos, neg)};
  const DriftTensors points{gen, pos, neg,
                            weight ? weight->contiguous() : tensor_of(all, options, one)};
  const double weight_sum = weight ? points.weights.sum(at::kDouble).item<double>()
                                   : static_cast<double>(all[0] * all[1]);

  const DriftDistances distances = weighted_distances(points, keep, count);
  const double tiny = std::numeric_limits<float>::min();
  const DriftSetting setting{distances.values, distances.total / std::max(weight_sum, tiny),
                             temperatures};
  const bool many = points.many_small();
  const Tensor balances =
      many ? at::cpu::empty(balance_shape(gen, points.weights, temperatures), options) : Tensor();
  Tensor force;
  std::vector<double> norms, force_squares, factors;
  if (many) {
    norms = many_squares(points, setting, distances.grams, balances);
  } else {
    std::tie(force, norms) = raw_forces(points, setting);
  }
  for (double& norm : norms) {
    norm /= static_cast<double>(gen.numel());
    factors.push_back(1 / std::sqrt(std::max(norm, kMinMeanSquare)));
  }
  std::tie(force, force_squares) =
      many ? many_forces(points, setting, balances, factors) : sum_forces(force, factors);
  const double size = static_cast<double>(gen.size(1) * gen.size(2));
  return {force, tensor_of({}, options, [&](int64_t) { return setting.scale; }),
          tensor_of({count}, options, [&](int64_t t) { return norms[t]; }),
          tensor_of({batch}, options, [&](int64_t b) { return force_squares[b] / size; })};
}

// force[b] factor[b], of the dtype of the samples that the gradient belongs to.
Tensor drift_loss_gradient(const Tensor& force, const Tensor& factor, at::ScalarType dtype) {
  check_rank("drift_loss_gradient", "force", force, 3);
  check_shape("drift_loss_gradient", "factor", factor, {force.size(0)});
  Tensor gradient = empty_large(force.sizes(), force.options().dtype(dtype));
  at::mul_out(gradient, force, factor.to(force.scalar_type()).view({-1, 1, 1}));
  return gradient;
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, CPU, library) {
  library.impl("drift_field", &drift_field);
  library.impl("drift_distances", &drift_distances);
  library.impl("drift_force", &drift_force);
  library.impl("drift_squares", &drift_squares);
  library.impl("drift_combined_force", &drift_combined_force);
  library.impl("drift_loss_gradient", &drift_loss_gradient);
}

}  // namespace driftar::cpu
