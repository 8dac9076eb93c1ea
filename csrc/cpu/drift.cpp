#include "drift.h"

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "parallel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>
#include <vector>

namespace driftar::cpu {

namespace {

using at::Tensor;
using std::optional;

void check_problem(const char* op, const Tensor& gen, const Tensor& pos,
                   const optional<Tensor>& neg, const Tensor& weight) {
  check_floating(op, "gen", gen);
  check_rank(op, "gen", gen, 3);
  TORCH_CHECK_VALUE(gen.numel() > 0, op, ": gen must not be empty, got shape ", gen.sizes());
  const auto check_part = [&](const char* name, const Tensor& x) {
    check_rank(op, name, x, 3);
    check_like(op, name, x, gen);
    check_shape(op, name, x, {gen.size(0), x.size(1), gen.size(2)});
  };
  check_part("pos", pos);
  if (neg) check_part("neg", *neg);
  const int64_t points = gen.size(1) + pos.size(1) + (neg ? neg->size(1) : 0);
  check_shape(op, "weight", weight, {gen.size(0), points});
  TORCH_CHECK_TYPE(weight.scalar_type() == accumulation_type(gen.scalar_type()), op,
                   ": weight must be ", accumulation_type(gen.scalar_type()));
}

template <typename T>
Samples<T> samples(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.size(1), x.stride(0), x.stride(1), x.stride(2)};
}

// The parts of a problem that own memory, for as long as the kernels run.
struct Workspace {
  Tensor weight, centred, squared_norms;

  template <typename T>
  void fill(DriftProblem<T>& call, const Tensor& gen, const Tensor& pos,
            const optional<Tensor>& neg, const Tensor& weights) {
    using acc_t = accumulate_t<T>;
    weight = weights.contiguous();
    call.batch = gen.size(0), call.generated = gen.size(1), call.features = gen.size(2);
    call.points = weights.size(1), call.positives = pos.size(1);
    call.panel = panel_height(call.generated, call.points);
    call.parts[0] = samples<T>(gen);
    call.parts[1] = neg ? samples<T>(*neg) : Samples<T>{};
    call.parts[2] = samples<T>(pos);
    centred = at::empty({call.batch, call.points, call.features}, weights.options());
    squared_norms = at::empty({call.batch, call.points}, weights.options());
    call.weight = weight.const_data_ptr<acc_t>();
    call.centred = centred.mutable_data_ptr<acc_t>();
    call.squared_norms = squared_norms.mutable_data_ptr<acc_t>();
    call.distances = nullptr;
  }
};

std::tuple<Tensor, Tensor> drift_distances(const Tensor& gen, const Tensor& pos,
                                           const optional<Tensor>& neg, const Tensor& weight,
                                           bool keep) {
  check_problem("drift_distances", gen, pos, neg, weight);
  const Tensor distances =
      at::empty({keep ? gen.size(0) : 0, gen.size(1), weight.size(1)}, weight.options());
  double total = 0;
  dispatch_floating(gen.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    Workspace workspace;
    DriftProblem<scalar_t> call;
    workspace.fill(call, gen, pos, neg, weight);
    if (keep) call.distances = distances.mutable_data_ptr<acc_t>();
    const int64_t tasks = call.batch * call.panels(), slot_size = drift_scratch(call);
    const Tensor scratch = at::empty({thread_count(), slot_size}, weight.options());
    acc_t* memory = scratch.mutable_data_ptr<acc_t>();
    std::vector<double> partial(tasks);
    dispatch_isa([&](auto isa) {
      using Kernel = DriftKernel<decltype(isa)::value, scalar_t>;
      parallel_for(call.batch, [&](int64_t task, int64_t) { Kernel::centre(call, task); });
      parallel_for(tasks, [&](int64_t task, int64_t slot) {
        partial[task] = Kernel::weighted_distance(call, task, memory + slot * slot_size);
      });
    });
    total =
        std::accumulate(partial.begin(), partial.end(), 0.0) / static_cast<double>(call.generated);
  });
  const Tensor sums = at::tensor({total, weight.sum(at::kDouble).item<double>()}, at::kDouble);
  return {distances, sums.to(weight.scalar_type())};
}

std::tuple<Tensor, Tensor> drift_force(const Tensor& gen, const Tensor& pos,
                                       const optional<Tensor>& neg, const Tensor& weight,
                                       const Tensor& distances, const Tensor& scale,
                                       at::ArrayRef<double> temperatures) {
  const char* op = "drift_force";
  check_problem(op, gen, pos, neg, weight);
  const int64_t count = static_cast<int64_t>(temperatures.size());
  for (const double temperature : temperatures) {
    TORCH_CHECK_VALUE(temperature > 0, op, ": temperatures must be > 0, got ", temperature);
  }
  TORCH_CHECK_VALUE(scale.numel() == 1 && scale.is_cpu(), op, ": scale must be a CPU scalar");
  const bool kept = distances.numel() > 0;
  if (kept) {
    check_shape(op, "distances", distances, {gen.size(0), gen.size(1), weight.size(1)});
    TORCH_CHECK_TYPE(distances.scalar_type() == weight.scalar_type(), op, ": distances must be ",
                     weight.scalar_type());
  }
  const Tensor force = at::empty({count, gen.size(0), gen.size(1), gen.size(2)}, weight.options());
  std::vector<double> squares(count, 0.0);
  dispatch_floating(gen.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    Workspace workspace;
    DriftForce<scalar_t> call;
    workspace.fill(call, gen, pos, neg, weight);
    const Tensor contiguous = distances.contiguous();
    call.kept = kept ? contiguous.const_data_ptr<acc_t>() : nullptr;
    call.scale = static_cast<acc_t>(scale.item<double>());
    const std::vector<acc_t> values(temperatures.begin(), temperatures.end());
    call.temperatures = values.data();
    call.temperature_count = count;
    call.chunks =
        std::clamp<int64_t>((thread_count() + call.batch - 1) / call.batch, 1, call.panels());

    const Tensor row_lse = at::empty({call.batch, count, call.generated}, weight.options());
    const std::vector<int64_t> columns = {call.batch, call.chunks, count, call.points};
    const Tensor column_max = at::empty(columns, weight.options());
    const Tensor column_sum = at::empty(columns, weight.options());
    call.row_lse = row_lse.mutable_data_ptr<acc_t>();
    call.column_max = column_max.mutable_data_ptr<acc_t>();
    call.column_sum = column_sum.mutable_data_ptr<acc_t>();
    call.force = force.mutable_data_ptr<acc_t>();
    const int64_t tasks = call.batch * call.panels(), slot_size = drift_scratch(call);
    std::vector<double> partial(tasks * count);
    call.squares = partial.data();
    const Tensor scratch = at::empty({thread_count(), slot_size}, weight.options());
    acc_t* memory = scratch.mutable_data_ptr<acc_t>();

    dispatch_isa([&](auto isa) {
      using Kernel = DriftKernel<decltype(isa)::value, scalar_t>;
      parallel_for(call.batch, [&](int64_t task, int64_t) { Kernel::centre(call, task); });
      parallel_for(call.batch * call.chunks, [&](int64_t task, int64_t slot) {
        Kernel::normalisers(call, task, memory + slot * slot_size);
      });
      parallel_for(call.batch, [&](int64_t task, int64_t) { Kernel::merge_columns(call, task); });
      parallel_for(tasks, [&](int64_t task, int64_t slot) {
        Kernel::force(call, task, memory + slot * slot_size);
      });
    });
    for (size_t i = 0; i < partial.size(); ++i) squares[i % count] += partial[i];
  });
  return {force, at::tensor(squares, at::kDouble).to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, CPU, library) {
  library.impl("drift_distances", &drift_distances);
  library.impl("drift_force", &drift_force);
}

}  // namespace driftar::cpu
