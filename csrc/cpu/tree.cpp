#include "tree.h"

#include "../common/dispatch.h"
#include "../common/tree_arguments.h"
#include "parallel.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>
#include <vector>

namespace driftar::cpu {

namespace {

using at::Tensor;
using Verdict = std::tuple<Tensor, Tensor, Tensor>;

// Work of one task, enough to outweigh waking a thread.
constexpr int64_t kTaskElements = 1 << 15;  // compared
constexpr int64_t kTaskNodes = 1 << 13;     // walked
constexpr int64_t kTaskBytes = 1 << 18;     // moved
// Elements whose comparison takes as long as a step of the walk.
constexpr int64_t kNodeElements = kTaskElements / kTaskNodes;

// How many items of `size` make up a task of `total`.
int64_t items_per_task(int64_t total, int64_t size) {
  return std::max<int64_t>(total / std::max<int64_t>(size, 1), 1);
}

// Allocates the verdict on model [B, N, ...] and calls run(call) with what is left of it to fill
// in: it returns whether every path fits max_depth.
template <typename Run>
Verdict make_verdict(const char* op, const Tensor& parents, const Tensor& model, int64_t max_depth,
                     Run&& run) {
  check_tree(op, parents, model, max_depth);
  const int64_t batch = model.size(0), nodes = model.size(1);
  const Tensor values = checked_parents(op, parents);
  const auto index = values.options();
  const Tensor length = at::cpu::empty({batch}, index), node = at::cpu::empty({batch}, index);
  const Tensor path = at::cpu::empty({batch, max_depth}, index);
  const bool fits = run(WalkCall{.nodes = nodes,
                                 .max_depth = max_depth,
                                 .parents = values.const_data_ptr<int64_t>(),
                                 .parents_batch = values.size(0) == 1 ? 0 : 1,
                                 .accept = nullptr,
                                 .length = length.mutable_data_ptr<int64_t>(),
                                 .path = path.mutable_data_ptr<int64_t>(),
                                 .node = node.mutable_data_ptr<int64_t>()});
  TORCH_CHECK_VALUE(fits, op, ": max_depth must be at least the depth of the tree, got ",
                    max_depth);
  return {length, path, node};
}

// Calls walk(b, level) for every sample, `size` of which make up a task; whether all returned true.
template <typename Walk>
bool walk_samples(int64_t batch, int64_t nodes, int64_t size, const Walk& walk) {
  std::atomic<bool> fits{true};
  for_each_piece(batch, size, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> level(nodes);
    for (int64_t b = begin; b < end; ++b) {
      if (!walk(b, level.data())) fits = false;
    }
  });
  return fits;
}

Verdict walk_tree(const Tensor& parents, const Tensor& accept, int64_t max_depth) {
  check_accept("walk_tree", accept, parents);
  const Tensor accepted = accept.contiguous();
  const int64_t batch = accept.size(0), nodes = accept.size(1);
  return make_verdict("walk_tree", parents, accept, max_depth, [&](WalkCall call) {
    call.accept = accepted.const_data_ptr<bool>();
    return dispatch_isa([&](auto isa) {
      using Kernel = TreeKernel<decltype(isa)::value>;
      return walk_samples(batch, nodes, items_per_task(kTaskNodes, nodes),
                          [&](int64_t b, int64_t* level) { return Kernel::walk(call, b, level); });
    });
  });
}

Verdict verify_tree(const Tensor& parents, const Tensor& draft, const Tensor& target,
                    double tolerance, int64_t max_depth) {
  const char* op = "verify_tree";
  check_drafts(op, draft, target, parents, tolerance);
  const Tensor drafts = draft.contiguous(), targets = target.contiguous();
  const int64_t batch = draft.size(0), nodes = draft.size(1), width = draft.size(2);
  return make_verdict(op, parents, draft, max_depth, [&](const WalkCall& walk) {
    return dispatch_floating(draft.scalar_type(), [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      const VerifyCall<scalar_t> call{walk, width, static_cast<accumulate_t<scalar_t>>(tolerance),
                                      drafts.const_data_ptr<scalar_t>(),
                                      targets.const_data_ptr<scalar_t>()};
      return dispatch_isa([&](auto isa) {
        using Kernel = TreeKernel<decltype(isa)::value>;
        return walk_samples(
            batch, nodes, items_per_task(kTaskElements, nodes * (width + kNodeElements)),
            [&](int64_t b, int64_t* level) { return Kernel::verify(call, b, level); });
      });
    });
  });
}

std::tuple<Tensor, Tensor> verify_chain(const Tensor& draft, const Tensor& draft_mean,
                                        const Tensor& draft_std, const Tensor& target_mean,
                                        const Tensor& target_std, const Tensor& seed) {
  const char* op = "verify_chain";
  check_chain(op, draft, draft_mean, draft_std, target_mean, target_std, seed);
  const int64_t batch = draft.size(0), count = draft.size(1), width = draft.size(2);

  const auto refuse_unusable = [op](const char* name, const Tensor& std) {
    const bool usable = dispatch_floating(std.scalar_type(), [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      const scalar_t* values = std.const_data_ptr<scalar_t>();
      return std::all_of(values, values + std.numel(), [](scalar_t value) {
        const double x = static_cast<double>(value);
        return x >= 0 && std::isfinite(x);
      });
    });
    TORCH_CHECK_VALUE(usable, op, ": ", name, " must be finite and >= 0");
  };
  const Tensor drafts = draft.contiguous(), draft_means = draft_mean.contiguous(),
               draft_stds = draft_std.contiguous(), target_means = target_mean.contiguous(),
               target_stds = target_std.contiguous();
  refuse_unusable("draft_std", draft_stds);
  refuse_unusable("target_std", target_stds);
  const Tensor length = at::empty({batch}, draft.options().dtype(at::kLong));
  const Tensor sample = at::empty({batch, width}, draft.options().dtype(at::kDouble));
  dispatch_floating(draft.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const ChainCall<scalar_t> call{count,
                                   width,
                                   drafts.const_data_ptr<scalar_t>(),
                                   draft_means.const_data_ptr<scalar_t>(),
                                   draft_stds.const_data_ptr<scalar_t>(),
                                   target_means.const_data_ptr<scalar_t>(),
                                   target_stds.const_data_ptr<scalar_t>(),
                                   static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()),
                                   length.mutable_data_ptr<int64_t>(),
                                   sample.mutable_data_ptr<double>()};
    dispatch_isa([&](auto isa) {
      using Kernel = TreeKernel<decltype(isa)::value>;
      // Every sample draws D normal numbers, each the work of some fifty comparisons.
      for_each_piece(batch, items_per_task(kTaskElements, 50 * width),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t b = begin; b < end; ++b) Kernel::verify_chain(call, b);
                     });
    });
  });
  return {length, sample.to(accumulation_type(draft.scalar_type()))};
}

// Every path increases and stays inside the cache.
void check_paths(const Tensor& key_lengths, const Tensor& path, const Tensor& length,
                 int64_t capacity) {
  const int64_t max_depth = path.size(1);
  const int64_t *prefix = key_lengths.const_data_ptr<int64_t>(),
                *steps = length.const_data_ptr<int64_t>(), *nodes = path.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < key_lengths.numel(); ++b) {
    TORCH_CHECK_VALUE(prefix[b] >= 0 && prefix[b] <= capacity,
                      "commit_path: key_lengths must lie in [0, ", capacity, "], got ", prefix[b],
                      " for sample ", b);
    TORCH_CHECK_VALUE(steps[b] >= 0 && steps[b] <= max_depth,
                      "commit_path: verdict.length must lie in [0, ", max_depth, "], got ",
                      steps[b], " for sample ", b);
    int64_t previous = -1;
    for (int64_t step = 0; step < steps[b]; ++step) {
      const int64_t node = nodes[b * max_depth + step];
      TORCH_CHECK_VALUE(node > previous && node < capacity - prefix[b],
                        "commit_path: verdict.path must increase and stay inside the cache of ",
                        capacity, " rows, got node ", node, " behind ", prefix[b],
                        " keys for sample ", b);
      previous = node;
    }
  }
}

Tensor commit_path(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key_lengths,
                   const Tensor& path, const Tensor& length) {
  const char* op = "commit_path";
  check_commit(op, key_cache, value_cache, key_lengths, path, length);
  const int64_t batch = key_cache.size(0), capacity = key_cache.size(2);
  const auto indices = [](const Tensor& x) { return x.to(at::kLong).contiguous(); };
  const Tensor prefix = indices(key_lengths), nodes = indices(path), steps = indices(length);
  check_paths(prefix, nodes, steps, capacity);
  for (const Tensor& cache : {key_cache, value_cache}) {
    if (cache.numel() == 0) continue;
    const int64_t element = static_cast<int64_t>(cache.element_size());
    const CommitCall call{static_cast<std::byte*>(cache.mutable_data_ptr()),
                          cache.size(1),
                          cache.size(3),
                          element,
                          cache.stride(0) * element,
                          cache.stride(1) * element,
                          cache.stride(2) * element,
                          cache.stride(3) * element,
                          path.size(1),
                          prefix.const_data_ptr<int64_t>(),
                          nodes.const_data_ptr<int64_t>(),
                          steps.const_data_ptr<int64_t>()};
    dispatch_isa([&](auto isa) {
      using Kernel = TreeKernel<decltype(isa)::value>;
      for_each_piece(batch * call.heads,
                     items_per_task(kTaskBytes, call.max_depth * call.width * element),
                     [&](int64_t begin, int64_t end) { Kernel::commit(call, begin, end); });
    });
  }
  return prefix + steps;
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, CPU, library) {
  library.impl("walk_tree", &walk_tree);
  library.impl("verify_tree", &verify_tree);
  library.impl("verify_chain", &verify_chain);
  library.impl("commit_path", &commit_path);
}

}  // namespace driftar::cpu
