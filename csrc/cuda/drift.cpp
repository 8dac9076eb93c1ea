#include "drift.h"

#include "../common/drift_arguments.h"
#include "device.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace driftar::cuda {

namespace {

using at::Tensor;
using std::optional;

Samples samples_of(const Tensor& x) {
  return {x.const_data_ptr(), x.size(1),   x.stride(0),
          x.stride(1),        x.stride(2), moves_in_vectors(x)};
}

// A call's points, checked, on their device and stream for as long as it lives.
class Problem {
 public:
  Problem(const char* op, const Tensor& gen, const Tensor& pos, const optional<Tensor>& neg,
          const Tensor& weight)
      : op_(op), scope_(gen) {
    check_drift_points(op, gen, pos, neg, weight);
    batch.type = scalar_of(op, "gen", gen);
    batch.batch = gen.size(0), batch.generated = gen.size(1), batch.features = gen.size(2);
    batch.points = weight.size(1), batch.positives = pos.size(1);
    batch.rows = batch.generated;
    batch.parts[0] = samples_of(gen), batch.parts[2] = samples_of(pos);
    if (neg) batch.parts[1] = samples_of(*neg);
    weight_ = weight.contiguous();
    batch.weight = weight_.const_data_ptr<float>();
  }

  // What the passes over pairs need besides the points; `distances` must outlive the call.
  void set_statistics(const Tensor& gen, const Tensor& distances, const Tensor& scale,
                      at::ArrayRef<double> temperatures) {
    check_drift_statistics(op_, gen, weight_, distances, scale, temperatures);
    const auto count = static_cast<int64_t>(temperatures.size());
    TORCH_CHECK_NOT_IMPLEMENTED(count <= kMaxTemperatures, op_, ": temperatures must be at most ",
                                kMaxTemperatures, " on this backend, got ", count);
    for (int64_t t = 0; t < count; ++t) {
      batch.inverse_temperatures[t] = static_cast<float>(1 / temperatures[t]);
    }
    batch.temperature_count = static_cast<int>(count);
    batch.scale = scale.const_data_ptr<float>();
    batch.kept = distances.numel() > 0 ? distances.const_data_ptr<float>() : nullptr;
  }

  // Whether the problems are so many and small that each gets a block of its own.
  bool is_many_small() {
    const int multiprocessors = device_attribute(op_, weight_, cudaDevAttrMultiProcessorCount),
              shared = device_attribute(op_, weight_, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    batch.together =
        temperatures_together(batch.batch, batch.generated, batch.points, batch.temperature_count,
                              multiprocessors, static_cast<size_t>(shared));
    return batch.together > 0;
  }

  // The pairs of all other problems, which need centred points.
  PairsCall centred() {
    centred_ = empty({batch.batch, batch.points, padded(batch.features)});
    batch.centred = centred_.const_data_ptr<float>();
    const CentreCall call{batch.type,
                          batch.batch,
                          batch.points,
                          batch.features,
                          {batch.parts[0], batch.parts[1], batch.parts[2]},
                          centred_.mutable_data_ptr<float>()};
    check_launch(op_, launch_centre(call, stream()));
    return batch;
  }

  cudaStream_t stream() const { return scope_.stream(); }
  Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, weight_.options()); }
  void check(cudaError_t error) const { check_launch(op_, error); }

  BatchCall batch{};

 private:
  const char* op_;
  DeviceScope scope_;
  Tensor weight_, centred_;
};

std::tuple<Tensor, Tensor> drift_distances(const Tensor& gen, const Tensor& pos,
                                           const optional<Tensor>& neg, const Tensor& weight,
                                           bool keep) {
  Problem problem("drift_distances", gen, pos, neg, weight);
  BatchCall& batch = problem.batch;
  const Tensor distances = problem.empty({keep ? batch.batch : 0, batch.generated, batch.points});
  batch.distances = keep ? distances.mutable_data_ptr<float>() : nullptr;
  const bool many = problem.is_many_small();
  const Tensor partial = problem.empty({many ? batch.batch : distance_blocks(batch)});
  batch.partial = partial.mutable_data_ptr<float>();
  if (many) {
    problem.check(launch_batch_distances(batch, problem.stream()));
  } else {
    const DistanceCall call{problem.centred(), batch.distances, batch.partial};
    problem.check(launch_distances(call, problem.stream()));
  }
  const Tensor total = partial.sum(at::kDouble) / static_cast<double>(batch.generated);
  const Tensor sums = at::stack({total, weight.sum(at::kDouble)});
  return {distances, sums.to(at::kFloat)};
}

// The passes over the pairs, panel by panel, that follow when the scale is known.
class Forces {
 public:
  // Of a problem with statistics; balances that are not `balanced` are computed.
  Forces(Problem& problem, const Tensor& distances, const Tensor& balances, bool balanced)
      : problem_(problem),
        pairs_(problem.centred()),
        distances_(distances),
        balances_(balances),
        kept_(distances.numel() > 0),
        balanced_(balanced),
        panel_(kept_ ? pairs_.generated
                     : panel_rows(pairs_.batch, pairs_.generated, pairs_.points, kPanelElements)) {
    if (!kept_) distances_ = problem.empty({pairs_.batch, panel_, pairs_.points});
    coefficients_ = problem.empty({pairs_.batch, panel_, padded(pairs_.points)});
    if (!balanced) normalise();
  }

  // The force of one temperature, or with factors [T] that of all; adds the sum of its squares to
  // `squares`, a scalar. Force and squares may be null.
  void run(int temperature, const float* factors, float* force, const Tensor* squares) {
    each_panel([&](const PairsCall& panel) {
      const Tensor partial = problem_.empty({squares == nullptr ? 0 : force_blocks(panel)});
      const ForceCall call{panel,
                           distances_.const_data_ptr<float>(),
                           balances_.mutable_data_ptr<float>(),
                           balanced_,
                           factors,
                           temperature,
                           coefficients_.mutable_data_ptr<float>(),
                           force,
                           squares == nullptr ? nullptr : partial.mutable_data_ptr<float>()};
      problem_.check(launch_force(call, problem_.stream()));
      if (squares != nullptr) squares->add_(partial.sum(at::kDouble));
    });
  }

 private:
  // Runs body(panel) where distances_ holds the distances of the panel.
  template <typename Body>
  void each_panel(Body&& body) {
    for (int64_t first = 0; first < pairs_.generated; first += panel_) {
      PairsCall panel = pairs_;
      panel.first_row = first, panel.rows = std::min(panel_, pairs_.generated - first);
      if (!kept_ && held_ != first) {
        const DistanceCall call{panel, distances_.mutable_data_ptr<float>(), nullptr};
        problem_.check(launch_distances(call, problem_.stream()));
        held_ = first;
      }
      body(panel);
    }
  }

  void normalise() {
    const Tensor least = problem_.empty({pairs_.batch, pairs_.points});
    each_panel([&](const PairsCall& panel) {
      const NormaliserCall call{panel, distances_.const_data_ptr<float>(),
                                balances_.mutable_data_ptr<float>(),
                                least.mutable_data_ptr<float>()};
      problem_.check(launch_normalisers(call, problem_.stream()));
    });
  }

  Problem& problem_;
  PairsCall pairs_;
  Tensor distances_, balances_, coefficients_;
  bool kept_, balanced_;
  int64_t panel_, held_ = -1;
};

Tensor squares_of(const Tensor& weight, int64_t count) {
  return at::zeros({count}, weight.options().dtype(at::kDouble));
}

std::tuple<Tensor, Tensor> drift_force(const Tensor& gen, const Tensor& pos,
                                       const optional<Tensor>& neg, const Tensor& weight,
                                       const Tensor& distances, const Tensor& scale,
                                       at::ArrayRef<double> temperatures) {
  const Tensor kept = distances.contiguous();
  Problem problem("drift_force", gen, pos, neg, weight);
  problem.set_statistics(gen, kept, scale, temperatures);
  Forces forces(problem, kept, problem.empty(balance_shape(gen, weight, temperatures)), false);
  const int count = problem.batch.temperature_count;
  const Tensor force = problem.empty({count, gen.size(0), gen.size(1), gen.size(2)});
  const Tensor squares = squares_of(weight, count);
  for (int t = 0; t < count; ++t) {
    const Tensor square = squares.select(0, t);
    forces.run(t, nullptr, force.mutable_data_ptr<float>() + t * gen.numel(), &square);
  }
  return {force, squares.to(at::kFloat)};
}

std::tuple<Tensor, Tensor> drift_squares(const Tensor& gen, const Tensor& pos,
                                         const optional<Tensor>& neg, const Tensor& weight,
                                         const Tensor& distances, const Tensor& scale,
                                         at::ArrayRef<double> temperatures) {
  const Tensor kept = distances.contiguous();
  Problem problem("drift_squares", gen, pos, neg, weight);
  problem.set_statistics(gen, kept, scale, temperatures);
  const int count = problem.batch.temperature_count;
  const Tensor balances = problem.empty(balance_shape(gen, weight, temperatures));
  if (problem.is_many_small()) {
    const Tensor partial = problem.empty({gen.size(0), count});
    problem.batch.balances = balances.mutable_data_ptr<float>();
    problem.batch.partial = partial.mutable_data_ptr<float>();
    problem.check(launch_batch_squares(problem.batch, problem.stream()));
    return {partial.sum(/*dim=*/0, /*keepdim=*/false, at::kDouble).to(at::kFloat), balances};
  }
  Forces forces(problem, kept, balances, false);
  const Tensor squares = squares_of(weight, count);
  for (int t = 0; t < count; ++t) {
    const Tensor square = squares.select(0, t);
    forces.run(t, nullptr, nullptr, &square);
  }
  return {squares.to(at::kFloat), balances};
}

std::tuple<Tensor, Tensor> drift_combined_force(const Tensor& gen, const Tensor& pos,
                                                const optional<Tensor>& neg, const Tensor& weight,
                                                const Tensor& distances, const Tensor& scale,
                                                at::ArrayRef<double> temperatures,
                                                const Tensor& balances, const Tensor& factors) {
  const char* op = "drift_combined_force";
  const Tensor kept = distances.contiguous(), given = balances.contiguous();
  Problem problem(op, gen, pos, neg, weight);
  problem.set_statistics(gen, kept, scale, temperatures);
  check_drift_balances(op, gen, weight, temperatures, given, factors);
  const Tensor values = factors.to(at::kFloat).contiguous();
  const Tensor force = problem.empty(gen.sizes());
  if (problem.is_many_small()) {
    problem.batch.balances = given.mutable_data_ptr<float>();
    problem.batch.factors = values.const_data_ptr<float>();
    problem.batch.force = force.mutable_data_ptr<float>();
    problem.check(launch_batch_force(problem.batch, problem.stream()));
  } else {
    Forces(problem, kept, given, true)
        .run(0, values.const_data_ptr<float>(), force.mutable_data_ptr<float>(), nullptr);
  }
  return {force, force.square().sum({1, 2}, /*keepdim=*/false, at::kDouble).to(at::kFloat)};
}

// force[b] factor[b], of the dtype of the samples that the gradient belongs to.
Tensor drift_loss_gradient(const Tensor& force, const Tensor& factor, at::ScalarType dtype) {
  check_rank("drift_loss_gradient", "force", force, 3);
  check_shape("drift_loss_gradient", "factor", factor, {force.size(0)});
  return (force * factor.to(force.scalar_type()).view({-1, 1, 1})).to(dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, DRIFTAR_CUDA_KEY, library) {
  library.impl("drift_distances", &drift_distances);
  library.impl("drift_force", &drift_force);
  library.impl("drift_squares", &drift_squares);
  library.impl("drift_combined_force", &drift_combined_force);
  library.impl("drift_loss_gradient", &drift_loss_gradient);
}

}  // namespace driftar::cuda
