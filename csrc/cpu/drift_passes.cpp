#include "drift_passes.h"

#include "../common/dispatch.h"
#include "drift.h"
#include "large_blocks.h"
#include "parallel.h"

#include <ATen/ops/empty_cpu_dispatch.h>

#include <algorithm>
#include <numeric>
#include <type_traits>

namespace driftar::cpu {

namespace {

using at::Tensor;

// Column statistics of a large problem: so many threads can gather them, and as their number does
// not depend on the threads, nor do the results.
constexpr int64_t kColumnChunks = 32;
// Elements of the Gram matrices of all problems that are kept.
constexpr int64_t kMaxGrams = 1 << 26;

template <typename T>
Samples<T> samples(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.size(1), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
DriftPoints<T> drift_points(const DriftTensors& x) {
  return {
      .batch = x.batch(),
      .generated = x.gen.size(1),
      .points = x.points(),
      .positives = x.pos.size(1),
      .features = x.gen.size(2),
      .parts = {samples<T>(x.gen), x.neg ? samples<T>(*x.neg) : Samples<T>{}, samples<T>(x.pos)},
      .weight = x.weights.const_data_ptr<accumulate_t<T>>()};
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

template <typename T>
double distances_of_many(const DriftBatch<T>& call, const at::TensorOptions& options) {
  std::vector<double> partial(call.batch);
  each_problem(call, options, [&](auto kernel, int64_t b, auto* memory) {
    partial[b] = kernel.weighted_distance(call, b, memory);
  });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

// Sums of [problems, T] over the problems.
std::vector<double> totals(const std::vector<double>& partial, int64_t count) {
  std::vector<double> result(count, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) result[i % count] += partial[i];
  return result;
}

template <typename T>
const T* data_or_null(const Tensor& x) {
  return x.numel() > 0 ? x.const_data_ptr<T>() : nullptr;
}

// The numbers of a setting in the type that forces are computed in.
template <typename acc_t>
struct Numbers {
  acc_t scale;
  std::vector<acc_t> temperatures;

  explicit Numbers(const DriftSetting& setting)
      : scale(static_cast<acc_t>(setting.scale)),
        temperatures(setting.temperatures.begin(), setting.temperatures.end()) {}

  // `call` refers to them.
  template <typename Call>
  void fill(Call& call, const DriftSetting& setting) const {
    call.kept = data_or_null<acc_t>(setting.distances);
    call.scale = scale;
    call.temperatures = temperatures.data();
    call.temperature_count = static_cast<int64_t>(temperatures.size());
  }
};

// Calls run(call) for a batch of problems with what both looks at their forces share.
template <typename Run>
void with_forces_of_many(const DriftTensors& x, const DriftSetting& setting, const Tensor& balances,
                         std::vector<double>& squares, const Run& run) {
  dispatch_floating(x.gen.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    DriftBatch<scalar_t> call{drift_points<scalar_t>(x)};
    const Numbers<acc_t> numbers(setting);
    numbers.fill(call, setting);
    call.balances = balances.mutable_data_ptr<acc_t>();
    call.squares = squares.data();
    run(call);
  });
}

}  // namespace

bool DriftTensors::many_small() const {
  return batch() >= kManyProblems && gen.size(1) * points() <= kSmallElements;
}

DriftDistances weighted_distances(const DriftTensors& x, bool keep, int64_t temperatures) {
  const auto options = x.weights.options();
  const int64_t batch = x.batch(), generated = x.gen.size(1), points = x.points();
  DriftDistances result;
  result.values = empty_large({keep ? batch : 0, generated, points}, options);
  result.total = dispatch_floating(x.gen.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    auto* kept = keep ? result.values.mutable_data_ptr<acc_t>() : nullptr;
    if (!x.many_small()) return distances_of_large(drift_points<scalar_t>(x), options, kept);
    DriftBatch<scalar_t> call{drift_points<scalar_t>(x)};
    call.distances = kept;
    const int64_t size = gram_size<acc_t>(points);
    const bool keeps_gram = keep && batch * size <= kMaxGrams &&
                            kept_gram_pays(generated, points, call.features, temperatures);
    result.grams = empty_large({keeps_gram ? batch : 0, size}, options);
    if (keeps_gram) call.grams = result.grams.mutable_data_ptr<acc_t>();
    return distances_of_many(call, options);
  });
  result.total /= static_cast<double>(generated);
  return result;
}

std::pair<Tensor, std::vector<double>> raw_forces(const DriftTensors& x,
                                                  const DriftSetting& setting) {
  const int64_t count = static_cast<int64_t>(setting.temperatures.size());
  const auto options = x.weights.options();
  const Tensor force = empty_large({count, x.batch(), x.gen.size(1), x.gen.size(2)}, options);
  std::vector<double> squares;
  dispatch_floating(x.gen.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    DriftForces<scalar_t> call{{drift_points<scalar_t>(x)}};
    const Numbers<acc_t> numbers(setting);
    numbers.fill(call, setting);
    BlockMemory owned;
    owned.fill(call, options, call.kept == nullptr, true);
    call.chunks = std::min(call.blocks(), kColumnChunks);

    const Tensor row_half = at::cpu::empty({call.batch, count, call.generated}, options);
    const std::vector<int64_t> columns = {call.batch, call.chunks, count,
                                          row_length<acc_t>(call.points)};
    const Tensor column_min = at::cpu::empty(columns, options);
    const Tensor column_sum = at::cpu::empty(columns, options);
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
    squares = totals(partial, count);
  });
  return {force, squares};
}

std::pair<Tensor, std::vector<double>> sum_forces(const Tensor& raw,
                                                  const std::vector<double>& factors) {
  const Tensor sum = empty_large(raw.sizes().slice(1), raw.options());
  std::vector<double> squares(raw.size(1), 0.0);
  dispatch_floating(raw.scalar_type(), [&](auto tag) {
    using acc_t = accumulate_t<typename decltype(tag)::type>;
    const std::vector<acc_t> values(factors.begin(), factors.end());
    DriftSum<acc_t> call{.batch = raw.size(1),
                         .size = raw.size(2) * raw.size(3),
                         .temperature_count = static_cast<int64_t>(values.size()),
                         .forces = raw.const_data_ptr<acc_t>(),
                         .factors = values.data(),
                         .sum = sum.mutable_data_ptr<acc_t>(),
                         .squares = nullptr};
    std::vector<double> partial(call.batch * call.pieces());
    call.squares = partial.data();
    dispatch_isa([&](auto isa) {
      using Kernel = DriftForceKernel<decltype(isa)::value, acc_t>;
      parallel_for(static_cast<int64_t>(partial.size()),
                   [&](int64_t task, int64_t) { Kernel::sum(call, task); });
    });
    for (size_t i = 0; i < partial.size(); ++i) squares[i / call.pieces()] += partial[i];
  });
  return {sum, squares};
}

std::vector<double> many_squares(const DriftTensors& x, const DriftSetting& setting,
                                 const Tensor& grams, const Tensor& balances) {
  std::vector<double> partial(x.batch() * setting.temperatures.size());
  with_forces_of_many(x, setting, balances, partial, [&](auto& call) {
    using acc_t = std::remove_pointer_t<decltype(call.grams)>;
    if (grams.numel() > 0) call.grams = grams.mutable_data_ptr<acc_t>();
    each_problem(call, x.weights.options(),
                 [&](auto kernel, int64_t b, auto* memory) { kernel.squares(call, b, memory); });
  });
  return totals(partial, static_cast<int64_t>(setting.temperatures.size()));
}

std::pair<Tensor, std::vector<double>> many_forces(const DriftTensors& x,
                                                   const DriftSetting& setting,
                                                   const Tensor& balances,
                                                   const std::vector<double>& factors) {
  const Tensor force = empty_large(x.gen.sizes(), x.weights.options());
  std::vector<double> squares(x.batch());
  with_forces_of_many(x, setting, balances, squares, [&](auto& call) {
    using acc_t = std::remove_pointer_t<decltype(call.force)>;
    const std::vector<acc_t> values(factors.begin(), factors.end());
    call.factors = values.data();
    call.force = force.mutable_data_ptr<acc_t>();
    each_problem(call, x.weights.options(),
                 [&](auto kernel, int64_t b, auto* memory) { kernel.combine(call, b, memory); });
  });
  return {force, squares};
}

}  // namespace driftar::cpu
