#include "tree.h"

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "parallel.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>

namespace driftar::cpu {

namespace {

using at::Tensor;
using Verdict = std::tuple<Tensor, Tensor, Tensor>;

// Walks every sample; judge(kernel, b, accept) fills accept[b, :] first.
template <typename Judge>
Verdict walk(const char* op, const Tensor& parents, int64_t batch, int64_t nodes, int64_t max_depth,
             bool* accept, const Judge& judge) {
  TORCH_CHECK_VALUE(max_depth >= 0, op, ": max_depth must be at least 0, got ", max_depth);
  const Tensor values = checked_parents(op, parents, batch);
  TORCH_CHECK_VALUE(values.size(1) == nodes, op, ": parents must have ", nodes, " nodes, got ",
                    values.size(1));
  const auto index = parents.options().dtype(at::kLong);
  const Tensor length = at::empty({batch}, index), node = at::empty({batch}, index);
  const Tensor path = at::empty({batch, max_depth}, index);
  const WalkCall call{nodes,
                      max_depth,
                      values.const_data_ptr<int64_t>(),
                      values.size(0) == 1 ? 0 : 1,
                      length.mutable_data_ptr<int64_t>(),
                      path.mutable_data_ptr<int64_t>(),
                      node.mutable_data_ptr<int64_t>()};
  const Tensor scratch = at::empty({thread_count(), walk_scratch(call)}, index);
  int64_t* memory = scratch.mutable_data_ptr<int64_t>();
  std::atomic<bool> fits{true};
  dispatch_isa([&](auto isa) {
    using Kernel = TreeKernel<decltype(isa)::value>;
    parallel_for(batch, [&](int64_t b, int64_t slot) {
      judge(Kernel{}, b, accept);
      if (!Kernel::walk(call, accept, b, memory + slot * walk_scratch(call))) fits = false;
    });
  });
  TORCH_CHECK_VALUE(fits, op, ": max_depth must be at least the depth of the tree, got ",
                    max_depth);
  return {length, path, node};
}

Verdict walk_tree(const Tensor& parents, const Tensor& accept, int64_t max_depth) {
  check_rank("walk_tree", "accept", accept, 2);
  TORCH_CHECK_TYPE(accept.scalar_type() == at::kBool, "walk_tree: accept must be bool, got ",
                   accept.scalar_type());
  const Tensor contiguous = accept.contiguous();
  // The walk only reads: nothing is judged here.
  return walk("walk_tree", parents, accept.size(0), accept.size(1), max_depth,
              const_cast<bool*>(contiguous.const_data_ptr<bool>()), [](auto, int64_t, bool*) {});
}

Verdict verify_tree(const Tensor& parents, const Tensor& draft, const Tensor& target,
                    double tolerance, int64_t max_depth) {
  check_floating("verify_tree", "draft", draft);
  check_rank("verify_tree", "draft", draft, 3);
  check_like("verify_tree", "target", target, draft);
  check_shape("verify_tree", "target", target, draft.sizes());
  const int64_t batch = draft.size(0), nodes = draft.size(1);
  const Tensor drafts = draft.contiguous(), targets = target.contiguous();
  const Tensor accept = at::empty({batch, nodes}, draft.options().dtype(at::kBool));
  return dispatch_floating(draft.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const VerifyCall<scalar_t> call{draft.size(2), static_cast<accumulate_t<scalar_t>>(tolerance),
                                    drafts.const_data_ptr<scalar_t>(),
                                    targets.const_data_ptr<scalar_t>()};
    return walk(
        "verify_tree", parents, batch, nodes, max_depth, accept.mutable_data_ptr<bool>(),
        [&](auto kernel, int64_t b, bool* accepted) { kernel.agree(call, nodes, b, accepted); });
  });
}

std::tuple<Tensor, Tensor> verify_chain(const Tensor& draft, const Tensor& draft_mean,
                                        const Tensor& draft_std, const Tensor& target_mean,
                                        const Tensor& target_std, const Tensor& seed) {
  const char* op = "verify_chain";
  check_floating(op, "draft", draft);
  check_rank(op, "draft", draft, 3);
  const int64_t batch = draft.size(0), count = draft.size(1), width = draft.size(2);
  check_shape(op, "draft_mean", draft_mean, {batch, count, width});
  check_shape(op, "draft_std", draft_std, {batch, count});
  check_shape(op, "target_mean", target_mean, {batch, count + 1, width});
  check_shape(op, "target_std", target_std, {batch, count + 1});
  check_like(op, "draft_mean", draft_mean, draft);
  check_like(op, "draft_std", draft_std, draft);
  check_like(op, "target_mean", target_mean, draft);
  check_like(op, "target_std", target_std, draft);
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 1 && seed.is_cpu(), op,
                    ": seed must hold one int64");

  const auto wide = [](const Tensor& x) { return x.to(at::kDouble).contiguous(); };
  const Tensor drafts = wide(draft), draft_means = wide(draft_mean), draft_stds = wide(draft_std);
  const Tensor target_means = wide(target_mean), target_stds = wide(target_std);
  const Tensor length = at::empty({batch}, draft.options().dtype(at::kLong));
  const Tensor sample = at::empty({batch, width}, draft.options().dtype(at::kDouble));
  const ChainCall call{count,
                       width,
                       drafts.const_data_ptr<double>(),
                       draft_means.const_data_ptr<double>(),
                       draft_stds.const_data_ptr<double>(),
                       target_means.const_data_ptr<double>(),
                       target_stds.const_data_ptr<double>(),
                       static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()),
                       length.mutable_data_ptr<int64_t>(),
                       sample.mutable_data_ptr<double>()};
  dispatch_isa([&](auto isa) {
    using Kernel = TreeKernel<decltype(isa)::value>;
    parallel_for(batch, [&](int64_t b, int64_t) { Kernel::verify_chain(call, b); });
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
  check_rank(op, "key_cache", key_cache, 4);
  check_rank(op, "value_cache", value_cache, 4);
  check_rank(op, "verdict.path", path, 2);
  const int64_t batch = key_cache.size(0), capacity = key_cache.size(2);
  check_shape(op, "value_cache", value_cache,
              {batch, key_cache.size(1), capacity, value_cache.size(3)});
  check_shape(op, "key_lengths", key_lengths, {batch});
  check_shape(op, "verdict.length", length, {batch});
  check_shape(op, "verdict.path", path, {batch, path.size(1)});
  const auto indices = [op](const char* name, const Tensor& x) {
    check_integer(op, name, x);
    TORCH_CHECK_VALUE(x.is_cpu(), op, ": ", name, " must be on the CPU like key_cache");
    return x.to(at::kLong).contiguous();
  };
  const Tensor prefix = indices("key_lengths", key_lengths), nodes = indices("verdict.path", path),
               steps = indices("verdict.length", length);
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
      parallel_for(batch, [&](int64_t b, int64_t) { Kernel::commit(call, b); });
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
