#include "drift.h"

#include "../common/checks.h"
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
  return {x.const_data_ptr(), x.size(1), x.stride(0), x.stride(1), x.stride(2)};
}

// The points of a call, checked and centred, on their device and stream for as long as it lives.
class Problem {
 public:
  Problem(const char* op, const Tensor& gen, const Tensor& pos, const optional<Tensor>& neg,
          const Tensor& weight)
      : op_(op), scope_(gen) {
    const Scalar type = scalar_of(op, "gen", gen);
    check_rank(op, "gen", gen, 3);
    TORCH_CHECK_VALUE(gen.numel() > 0, op, ": gen must not be empty, got shape ", gen.sizes());
    check_part("pos", pos, gen);
    if (neg) check_part("neg", *neg, gen);
    pairs.batch = gen.size(0), pairs.generated = gen.size(1), pairs.features = gen.size(2);
    pairs.positives = pos.size(1);
    pairs.points = pairs.generated + pairs.positives + (neg ? neg->size(1) : 0);
    check_shape(op, "weight", weight, {pairs.batch, pairs.points});
    check_statistic("weight", weight, gen);
    weight_ = weight.contiguous();
    centred_ = empty({pairs.batch, pairs.points, padded(pairs.features)});
    pairs.weight = weight_.const_data_ptr<float>();
    pairs.centred = centred_.const_data_ptr<float>();
    pairs.rows = pairs.generated;
    const CentreCall call{type,
                          pairs.batch,
                          pairs.points,
                          pairs.features,
                          {samples_of(gen), neg ? samples_of(*neg) : Samples{}, samples_of(pos)},
                          centred_.mutable_data_ptr<float>()};
    check_launch(op, launch_centre(call, stream()));
  }

  cudaStream_t stream() const { return scope_.stream(); }
  Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, weight_.options()); }

  // Rows [first, first + rows) of the pairs.
  PairsCall panel(int64_t first, int64_t rows) const {
    PairsCall result = pairs;
    result.first_row = first, result.rows = rows;
    return result;
  }

  // fp32 beside the points.
  void check_statistic(const char* name, const Tensor& x, const Tensor& gen) const {
    TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, op_, ": ", name, " must be fp32, got ",
                     x.scalar_type());
    TORCH_CHECK_VALUE(x.device() == gen.device(), op_, ": ", name, " must be on ", gen.device(),
                      ", got ", x.device());
  }

  PairsCall pairs{};

 private:
  void check_part(const char* name, const Tensor& x, const Tensor& gen) const {
    check_rank(op_, name, x, 3);
    check_like(op_, name, x, gen);
    check_shape(op_, name, x, {gen.size(0), x.size(1), gen.size(2)});
  }

  const char* op_;
  DeviceScope scope_;
  Tensor weight_, centred_;
};

std::tuple<Tensor, Tensor> drift_distances(const Tensor& gen, const Tensor& pos,
                                           const optional<Tensor>& neg, const Tensor& weight,
                                           bool keep) {
  const char* op = "drift_distances";
  const Problem problem(op, gen, pos, neg, weight);
  const PairsCall& pairs = problem.pairs;
  const Tensor distances = problem.empty({keep ? pairs.batch : 0, pairs.generated, pairs.points});
  const Tensor partial = problem.empty({distance_blocks(pairs)});
  const DistanceCall call{pairs, keep ? distances.mutable_data_ptr<float>() : nullptr,
                          partial.mutable_data_ptr<float>()};
  check_launch(op, launch_distances(call, problem.stream()));
  const Tensor total = partial.sum(at::kDouble) / static_cast<double>(pairs.generated);
  const Tensor sums = at::stack({total, weight.sum(at::kDouble)});
  return {distances, sums.to(at::kFloat)};
}

// The passes that follow when the scale is known.
class Forces {
 public:
  Forces(const char* op, const Tensor& gen, const Tensor& pos, const optional<Tensor>& neg,
         const Tensor& weight, const Tensor& distances, const Tensor& scale,
         at::ArrayRef<double> temperatures, const optional<Tensor>& balances = {})
      : op_(op), problem_(op, gen, pos, neg, weight), distances_(distances.contiguous()) {
    PairsCall& pairs = problem_.pairs;
    TORCH_CHECK_VALUE(scale.numel() == 1, op, ": scale must be a scalar");
    problem_.check_statistic("scale", scale, gen);
    const auto count = static_cast<int64_t>(temperatures.size());
    TORCH_CHECK_NOT_IMPLEMENTED(count <= kMaxTemperatures, op, ": temperatures must be at most ",
                                kMaxTemperatures, " on this backend, got ", count);
    for (int64_t t = 0; t < count; ++t) {
      TORCH_CHECK_VALUE(temperatures[t] > 0, op, ": temperatures must be > 0, got ",
                        temperatures[t]);
      pairs.inverse_temperatures[t] = static_cast<float>(1 / temperatures[t]);
    }
    pairs.temperature_count = static_cast<int>(count);
    pairs.scale = scale.const_data_ptr<float>();
    kept_ = distances_.numel() > 0;
    if (kept_) {
      check_shape(op, "distances", distances, {pairs.batch, pairs.generated, pairs.points});
      problem_.check_statistic("distances", distances, gen);
      panel_ = pairs.generated;
    } else {
      panel_ = panel_rows(pairs.batch, pairs.generated, pairs.points, kPanelElements);
      distances_ = problem_.empty({pairs.batch, panel_, pairs.points});
    }
    coefficients_ = problem_.empty({pairs.batch, panel_, padded(pairs.points)});
    const std::vector<int64_t> shape = {pairs.batch, count, 3 * pairs.generated + pairs.points};
    balanced_ = balances.has_value();
    if (balanced_) {
      check_shape(op, "balances", *balances, shape);
      problem_.check_statistic("balances", *balances, gen);
      balances_ = balances->contiguous();
    } else {
      balances_ = problem_.empty(shape);
      normalise();
    }
  }

  int64_t temperature_count() const { return problem_.pairs.temperature_count; }
  // Complete once every temperature has run.
  const Tensor& balances() const { return balances_; }
  Tensor empty(at::IntArrayRef shape) const { return problem_.empty(shape); }

  // The force of one temperature, or with factors [T] that of all; adds the sum of its squares to
  // `squares`, a scalar. Force and squares may be null.
  void run(int temperature, const Tensor* factors, float* force, const Tensor* squares) {
    each_panel([&](const PairsCall& panel) {
      const Tensor partial = problem_.empty({squares == nullptr ? 0 : force_blocks(panel)});
      const ForceCall call{panel,
                           distances_.const_data_ptr<float>(),
                           balances_.mutable_data_ptr<float>(),
                           balanced_,
                           factors == nullptr ? nullptr : factors->const_data_ptr<float>(),
                           temperature,
                           coefficients_.mutable_data_ptr<float>(),
                           force,
                           squares == nullptr ? nullptr : partial.mutable_data_ptr<float>()};
      check_launch(op_, launch_force(call, problem_.stream()));
      if (squares != nullptr) squares->add_(partial.sum(at::kDouble));
    });
  }

 private:
  // Runs body(panel) where distances_ holds the distances of the panel.
  template <typename Body>
  void each_panel(Body&& body) {
    const PairsCall& pairs = problem_.pairs;
    for (int64_t first = 0; first < pairs.generated; first += panel_) {
      const PairsCall panel = problem_.panel(first, std::min(panel_, pairs.generated - first));
      if (!kept_ && held_ != first) {
        const DistanceCall call{panel, distances_.mutable_data_ptr<float>(), nullptr};
        check_launch(op_, launch_distances(call, problem_.stream()));
        held_ = first;
      }
      body(panel);
    }
  }

  void normalise() {
    const Tensor least = problem_.empty({problem_.pairs.batch, problem_.pairs.points});
    each_panel([&](const PairsCall& panel) {
      const NormaliserCall call{panel, distances_.const_data_ptr<float>(),
                                balances_.mutable_data_ptr<float>(),
                                least.mutable_data_ptr<float>()};
      check_launch(op_, launch_normalisers(call, problem_.stream()));
    });
  }

  const char* op_;
  Problem problem_;
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
  Forces forces("drift_force", gen, pos, neg, weight, distances, scale, temperatures);
  const int64_t count = forces.temperature_count();
  const Tensor force = forces.empty({count, gen.size(0), gen.size(1), gen.size(2)});
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
  Forces forces("drift_squares", gen, pos, neg, weight, distances, scale, temperatures);
  const Tensor squares = squares_of(weight, forces.temperature_count());
  for (int t = 0; t < forces.temperature_count(); ++t) {
    const Tensor square = squares.select(0, t);
    forces.run(t, nullptr, nullptr, &square);
  }
  return {squares.to(at::kFloat), forces.balances()};
}

Tensor drift_combined_force(const Tensor& gen, const Tensor& pos, const optional<Tensor>& neg,
                            const Tensor& weight, const Tensor& distances, const Tensor& scale,
                            at::ArrayRef<double> temperatures, const Tensor& balances,
                            const Tensor& factors) {
  const char* op = "drift_combined_force";
  Forces forces(op, gen, pos, neg, weight, distances, scale, temperatures, balances);
  check_shape(op, "factors", factors, {forces.temperature_count()});
  TORCH_CHECK_VALUE(factors.device() == gen.device(), op, ": factors must be on ", gen.device());
  const Tensor values = factors.to(at::kFloat).contiguous();
  const Tensor force = forces.empty(gen.sizes());
  forces.run(0, &values, force.mutable_data_ptr<float>(), nullptr);
  return force;
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
