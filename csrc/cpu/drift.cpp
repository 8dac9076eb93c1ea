#include "drift.h"

#include "../common/dispatch.h"
#include "../common/drift_arguments.h"
#include "large_blocks.h"
#include "parallel.h"

#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

namespace driftar::cpu {

namespace {

using at::Tensor;
using std::optional;

// Column statistics of a large problem: so many threads can gather them, and as their number does
// not depend on the threads, nor do the results.
constexpr int64_t kColumnChunks = 32;
// MIN_MEAN_SQUARE of the reference.
constexpr double kMinMeanSquare = 1e-8;

template <typename T>
Samples<T> samples(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.size(1), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
DriftPoints<T> drift_points(const Tensor& gen, const Tensor& pos, const optional<Tensor>& neg,
                            const Tensor& weight) {
  return {.batch = gen.size(0),
          .generated = gen.size(1),
          .points = weight.size(1),
          .positives = pos.size(1),
          .features = gen.size(2),
          .parts = {samples<T>(gen), neg ? samples<T>(*neg) : Samples<T>{}, samples<T>(pos)},
          .weight = weight.const_data_ptr<accumulate_t<T>>()};
}

// Packed points and scratch of a call, for as long as the kernels run.
struct BlockMemory {
  Tensor by_feature, by_point, squared_norms, scratch;
  int64_t slot_size = 0;

  // Packs the points for distances, forces or both.
  template <typename T>
  void fill(DriftBlocks<T>& call, const at::TensorOptions& options, bool distances, bool forces) {
    using acc_t = accumulate_t<T>;
    const int64_t padded = panel_padded<acc_t>(call.points);
    const int64_t stripes = panels_of<acc_t>(call.features);
    call.height = std::min(block_height(call.points), call.generated);
    if (forces) {
      by_feature = empty_large({call.batch, stripes, call.points, kPanelWidth<acc_t>}, options);
      call.by_feature = by_feature.mutable_data_ptr<acc_t>();
    }
    if (distances) {
      by_point = empty_large({call.batch, padded, call.features}, options);
      squared_norms = at::cpu::empty({call.batch, stripes, padded}, options);
      call.by_point = by_point.mutable_data_ptr<acc_t>();
      call.squared_norms = squared_norms.mutable_data_ptr<acc_t>();
    }
    slot_size =
        std::max(block_scratch<acc_t>(call.height, call.points), padded * kPanelWidth<acc_t>);
    scratch = empty_large({thread_count(), slot_size}, options);
  }
};

template <typename Kernel, typename T, typename acc_t>
void pack_points(const DriftBlocks<T>& call, acc_t* memory, int64_t slot_size) {
  parallel_for(call.batch * panels_of<acc_t>(call.features), [&](int64_t task, int64_t slot) {
    Kernel::pack(call, task, memory + slot * slot_size);
  });
  if (call.by_point == nullptr) return;
  parallel_for(call.batch, [&](int64_t task, int64_t) { Kernel::merge_norms(call, task); });
}

template <typename T>
bool is_many_small(const DriftPoints<T>& call) {
  return call.batch >= kManyProblems && call.generated * call.points <= kSmallElements;
}

// Runs body(kernel, problem, memory) for every problem of the batch.
template <typename T, typename Body>
void each_problem(const DriftBatch<T>& call, const at::TensorOptions& options, Body&& body) {
  dispatch_isa([&](auto isa) {
    using Kernel = DriftBatchKernel<decltype(isa)::value, T>;
    const int64_t slot_size = Kernel::scratch(call);
    const Tensor scratch = empty_large({thread_count(), slot_size}, options);
    auto* memory = scratch.mutable_data_ptr<accumulate_t<T>>();
    parallel_for(call.batch,
                 [&](int64_t b, int64_t slot) { body(Kernel{}, b, memory + slot * slot_size); });
  });
}

template <typename T>
double distances_of_many(const DriftPoints<T>& points, const at::TensorOptions& options,
                         accumulate_t<T>* distances) {
  DriftBatch<T> call{points};
  call.distances = distances;
  std::vector<double> partial(call.batch);
  each_problem(call, options, [&](auto kernel, int64_t b, auto* memory) {
    partial[b] = kernel.weighted_distance(call, b, memory);
  });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

template <typename T>
double distances_of_large(const DriftPoints<T>& points, const at::TensorOptions& options,
                          accumulate_t<T>* distances) {
  DriftBlocks<T> call{points};
  BlockMemory owned;
  owned.fill(call, options, true, false);
  call.distances = distances;
  auto* memory = owned.scratch.mutable_data_ptr<accumulate_t<T>>();
  std::vector<double> partial(call.batch * call.blocks());
  dispatch_isa([&](auto isa) {
    using Kernel = DriftDistanceKernel<decltype(isa)::value, T>;
    pack_points<Kernel>(call, memory, owned.slot_size);
    parallel_for(call.batch * call.blocks(), [&](int64_t task, int64_t slot) {
      partial[task] = Kernel::weighted_distance(call, task, memory + slot * owned.slot_size);
    });
  });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

// Distances, empty unless they are to be kept, and sum_ij d_ij w_j / N over the batch.
std::tuple<Tensor, double> weighted_distances(const Tensor& gen, const Tensor& pos,
                                              const optional<Tensor>& neg, const Tensor& weights,
                                              bool keep) {
  const Tensor distances =
      empty_large({keep ? gen.size(0) : 0, gen.size(1), weights.size(1)}, weights.options());
  const double total = dispatch_floating(gen.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto points = drift_points<scalar_t>(gen, pos, neg, weights);
    auto* kept = keep ? distances.mutable_data_ptr<accumulate_t<scalar_t>>() : nullptr;
    return is_many_small(points) ? distances_of_many(points, weights.options(), kept)
                                 : distances_of_large(points, weights.options(), kept);
  });
  return {distances, total / static_cast<double>(gen.size(1))};
}

std::tuple<Tensor, Tensor> drift_distances(const Tensor& gen, const Tensor& pos,
                                           const optional<Tensor>& neg, const Tensor& weight,
                                           bool keep) {
  check_drift_points("drift_distances", gen, pos, neg, weight);
  const auto [distances, total] = weighted_distances(gen, pos, neg, weight.contiguous(), keep);
  const Tensor sums = at::tensor({total, weight.sum(at::kDouble).item<double>()}, at::kDouble);
  return {distances, sums.to(weight.scalar_type())};
}

// Raw force of each temperature [T, B, N, S] and its sum of squares.
std::tuple<Tensor, std::vector<double>> raw_forces(const Tensor& gen, const Tensor& pos,
                                                   const optional<Tensor>& neg,
                                                   const Tensor& weights, const Tensor& kept,
                                                   double scale,
                                                   at::ArrayRef<double> temperatures) {
  const int64_t count = static_cast<int64_t>(temperatures.size());
  const Tensor force =
      empty_large({count, gen.size(0), gen.size(1), gen.size(2)}, weights.options());
  std::vector<double> squares(count, 0.0);
  dispatch_floating(gen.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    DriftForces<scalar_t> call{{drift_points<scalar_t>(gen, pos, neg, weights)}};
    BlockMemory owned;
    owned.fill(call, weights.options(), kept.numel() == 0, true);
    call.kept = kept.numel() > 0 ? kept.const_data_ptr<acc_t>() : nullptr;
    call.scale = static_cast<acc_t>(scale);
    const std::vector<acc_t> values(temperatures.begin(), temperatures.end());
    call.temperatures = values.data();
    call.temperature_count = count;
    call.chunks = std::min(call.blocks(), kColumnChunks);

    const Tensor row_half = at::cpu::empty({call.batch, count, call.generated}, weights.options());
    const std::vector<int64_t> columns = {call.batch, call.chunks, count,
                                          row_length<acc_t>(call.points)};
    const Tensor column_min = at::cpu::empty(columns, weights.options());
    const Tensor column_sum = at::cpu::empty(columns, weights.options());
    call.row_half = row_half.mutable_data_ptr<acc_t>();
    call.column_min = column_min.mutable_data_ptr<acc_t>();
    call.column_sum = column_sum.mutable_data_ptr<acc_t>();
    call.force = force.mutable_data_ptr<acc_t>();
    std::vector<double> partial(call.batch * call.blocks() * count);
    call.squares = partial.data();
    acc_t* memory = owned.scratch.mutable_data_ptr<acc_t>();
    const int64_t slot_size = owned.slot_size;

    dispatch_isa([&](auto isa) {
      using Kernel = DriftForceKernel<decltype(isa)::value, scalar_t>;
      pack_points<DriftDistanceKernel<decltype(isa)::value, scalar_t>>(call, memory, slot_size);
      parallel_for(call.batch * call.chunks, [&](int64_t task, int64_t slot) {
        Kernel::normalisers(call, task, memory + slot * slot_size);
      });
      parallel_for(call.batch, [&](int64_t task, int64_t) { Kernel::merge_columns(call, task); });
      parallel_for(call.batch * call.blocks(), [&](int64_t task, int64_t slot) {
        Kernel::force(call, task, memory + slot * slot_size);
      });
    });
    for (size_t i = 0; i < partial.size(); ++i) squares[i % count] += partial[i];
  });
  return {force, squares};
}

std::tuple<Tensor, Tensor> drift_force(const Tensor& gen, const Tensor& pos,
                                       const optional<Tensor>& neg, const Tensor& weight,
                                       const Tensor& distances, const Tensor& scale,
                                       at::ArrayRef<double> temperatures) {
  check_drift_points("drift_force", gen, pos, neg, weight);
  check_drift_statistics("drift_force", gen, weight, distances, scale, temperatures);
  const auto [force, squares] =
      raw_forces(gen, pos, neg, weight.contiguous(), distances.contiguous(), scale.item<double>(),
                 temperatures);
  return {force, at::tensor(squares, at::kDouble).to(weight.scalar_type())};
}

// The sum of the temperatures' forces times their factors, and the sum of its squares per problem.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
std::tuple<Tensor, std::vector<double>> sum_forces(const Tensor& gen, const Tensor& forces,
                                                   const std::vector<acc_t>& factors) {
  const Tensor sum = empty_large(gen.sizes(), forces.options());
  DriftSum<acc_t> call{.batch = gen.size(0),
                       .size = gen.size(1) * gen.size(2),
                       .temperature_count = static_cast<int64_t>(factors.size()),
                       .forces = forces.const_data_ptr<acc_t>(),
                       .factors = factors.data(),
                       .sum = sum.mutable_data_ptr<acc_t>(),
                       .squares = nullptr};
  std::vector<double> partial(call.batch * call.pieces()), squares(call.batch, 0.0);
  call.squares = partial.data();
  dispatch_isa([&](auto isa) {
    using Kernel = DriftForceKernel<decltype(isa)::value, scalar_t>;
    parallel_for(static_cast<int64_t>(partial.size()),
                 [&](int64_t task, int64_t) { Kernel::sum(call, task); });
  });
  for (size_t i = 0; i < partial.size(); ++i) squares[i / call.pieces()] += partial[i];
  return {sum, squares};
}

template <typename acc_t, typename Value>
Tensor tensor_of(at::IntArrayRef sizes, const at::TensorOptions& options, const Value& value) {
  Tensor result = at::cpu::empty(sizes, options);
  acc_t* data = result.mutable_data_ptr<acc_t>();
  for (int64_t i = 0; i < result.numel(); ++i) data[i] = static_cast<acc_t>(value(i));
  return result;
}

// The whole field of one process: a small call costs what its calls into PyTorch cost.
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
  const int64_t batch = gen.size(0), points = drift_point_count(gen, pos, neg);
  const auto options = gen.options().dtype(accumulation_type(gen.scalar_type()));
  return dispatch_floating(gen.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto one = [](int64_t) { return 1; };
    const Tensor weights =
        weight ? weight->contiguous() : tensor_of<acc_t>({batch, points}, options, one);
    const auto [distances, total] = weighted_distances(gen, pos, neg, weights, keep);
    const acc_t* values = weights.const_data_ptr<acc_t>();
    const auto weight_sum =
        static_cast<acc_t>(std::accumulate(values, values + weights.numel(), 0.0));
    const acc_t scale =
        static_cast<acc_t>(total) / std::max(weight_sum, std::numeric_limits<acc_t>::min());
    const auto [raw, squares] =
        raw_forces(gen, pos, neg, weights, distances, static_cast<double>(scale), temperatures);
    std::vector<acc_t> norms, factors;
    for (const double square : squares) {
      norms.push_back(static_cast<acc_t>(square) / static_cast<acc_t>(gen.numel()));
      factors.push_back(1 / std::sqrt(std::max(norms.back(), acc_t(kMinMeanSquare))));
    }
    const auto [force, force_squares] = sum_forces<scalar_t>(gen, raw, factors);
    const double size = static_cast<double>(gen.size(1) * gen.size(2));
    return std::tuple<Tensor, Tensor, Tensor, Tensor>{
        force, tensor_of<acc_t>({}, options, [&](int64_t) { return scale; }),
        tensor_of<acc_t>({static_cast<int64_t>(norms.size())}, options,
                         [&](int64_t t) { return norms[t]; }),
        tensor_of<acc_t>({batch}, options, [&](int64_t b) { return force_squares[b] / size; })};
  });
}

// A batch of problems with what their forces need besides the points.
template <typename T>
struct BatchOfForces : DriftBatch<T> {
  using acc_t = accumulate_t<T>;
  std::vector<acc_t> temperature_values;

  BatchOfForces(const DriftPoints<T>& points, const Tensor& distances, const Tensor& scale,
                at::ArrayRef<double> temperatures)
      : DriftBatch<T>{points}, temperature_values(temperatures.begin(), temperatures.end()) {
    this->kept = distances.numel() > 0 ? distances.const_data_ptr<acc_t>() : nullptr;
    this->scale = static_cast<acc_t>(scale.item<double>());
    this->temperatures = temperature_values.data();
    this->temperature_count = static_cast<int64_t>(temperature_values.size());
  }
};

std::tuple<Tensor, Tensor> drift_squares(const Tensor& gen, const Tensor& pos,
                                         const optional<Tensor>& neg, const Tensor& weight,
                                         const Tensor& distances, const Tensor& scale,
                                         at::ArrayRef<double> temperatures) {
  check_drift_points("drift_squares", gen, pos, neg, weight);
  check_drift_statistics("drift_squares", gen, weight, distances, scale, temperatures);
  const Tensor weights = weight.contiguous(), kept = distances.contiguous();
  const Tensor balances =
      at::cpu::empty(balance_shape(gen, weight, temperatures), weight.options());
  std::vector<double> partial(gen.size(0) * temperatures.size()), squares(temperatures.size(), 0.0);
  dispatch_floating(gen.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    BatchOfForces<scalar_t> call(drift_points<scalar_t>(gen, pos, neg, weights), kept, scale,
                                 temperatures);
    call.balances = balances.mutable_data_ptr<accumulate_t<scalar_t>>();
    call.squares = partial.data();
    each_problem(call, weight.options(),
                 [&](auto kernel, int64_t b, auto* memory) { kernel.squares(call, b, memory); });
  });
  for (size_t i = 0; i < partial.size(); ++i) squares[i % squares.size()] += partial[i];
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
  const Tensor weights = weight.contiguous(), kept = distances.contiguous();
  const Tensor values = factors.to(weight.scalar_type()).contiguous();
  Tensor own = balances.contiguous();
  const Tensor force = empty_large(gen.sizes(), weight.options());
  std::vector<double> squares(gen.size(0));
  dispatch_floating(gen.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    BatchOfForces<scalar_t> call(drift_points<scalar_t>(gen, pos, neg, weights), kept, scale,
                                 temperatures);
    call.balances = own.mutable_data_ptr<acc_t>();
    call.factors = values.const_data_ptr<acc_t>();
    call.force = force.mutable_data_ptr<acc_t>();
    call.squares = squares.data();
    each_problem(call, weight.options(),
                 [&](auto kernel, int64_t b, auto* memory) { kernel.combine(call, b, memory); });
  });
  return {force, at::tensor(squares, at::kDouble).to(weight.scalar_type())};
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
