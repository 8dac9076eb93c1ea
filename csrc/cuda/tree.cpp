#include "tree.h"

#include "../common/tree_arguments.h"
#include "device.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

namespace driftar::cuda {

namespace {

using at::Tensor;
using VerdictTensors = std::tuple<Tensor, Tensor, Tensor>;

// Runs the call, whose criterion of acceptance is set, on the tree. The values of parents stay on
// the device: the kernels reject nodes with a parent that is not -1 or an earlier node.
VerdictTensors walk(const char* op, TreeCall& call, const Tensor& parents, const Tensor& model,
                    int64_t max_depth) {
  check_tree(op, parents, model, max_depth);
  call.batch = model.size(0), call.nodes = model.size(1), call.max_depth = max_depth;
  TORCH_CHECK_NOT_IMPLEMENTED(call.nodes <= kMaxNodes, op, ": a tree must have at most ", kMaxNodes,
                              " nodes on this backend, got ", call.nodes);
  const Tensor values = parents.to(at::kLong).contiguous();
  const auto index = parents.options().dtype(at::kLong);
  const Tensor length = at::empty({call.batch}, index), node = at::empty({call.batch}, index);
  const Tensor path = at::empty({call.batch, max_depth}, index);
  call.parents = values.const_data_ptr<int64_t>();
  call.parents_stride = values.size(0) == 1 ? 0 : call.nodes;
  call.verdict = {length.mutable_data_ptr<int64_t>(), path.mutable_data_ptr<int64_t>(),
                  node.mutable_data_ptr<int64_t>()};
  const DeviceScope scope(model);
  check_launch(op, launch_walk_tree(call, scope.stream()));
  return {length, path, node};
}

VerdictTensors walk_tree(const Tensor& parents, const Tensor& accept, int64_t max_depth) {
  check_accept("walk_tree", accept, parents);
  const Tensor accepted = accept.contiguous();
  TreeCall call{};
  call.accept = accepted.const_data_ptr<bool>();
  return walk("walk_tree", call, parents, accept, max_depth);
}

VerdictTensors verify_tree(const Tensor& parents, const Tensor& draft, const Tensor& target,
                           double tolerance, int64_t max_depth) {
  const char* op = "verify_tree";
  check_drafts(op, draft, target, parents, tolerance);
  const Tensor drafts = draft.contiguous(), targets = target.contiguous();
  TreeCall call{};
  call.type = scalar_of(op, "draft", draft);
  call.width = draft.size(2);
  call.tolerance = static_cast<float>(tolerance);
  call.draft = drafts.const_data_ptr();
  call.target = targets.const_data_ptr();
  return walk(op, call, parents, draft, max_depth);
}

std::tuple<Tensor, Tensor> verify_chain(const Tensor& draft, const Tensor& draft_mean,
                                        const Tensor& draft_std, const Tensor& target_mean,
                                        const Tensor& target_std, const Tensor& seed) {
  const char* op = "verify_chain";
  check_chain(op, draft, draft_mean, draft_std, target_mean, target_std, seed);
  const int64_t batch = draft.size(0), count = draft.size(1), width = draft.size(2);
  const Scalar type = scalar_of(op, "draft", draft);
  const Tensor drafts = draft.contiguous(), draft_means = draft_mean.contiguous(),
               draft_stds = draft_std.contiguous(), target_means = target_mean.contiguous(),
               target_stds = target_std.contiguous();
  const Tensor length = at::empty({batch}, draft.options().dtype(at::kLong));
  const Tensor sample = at::empty({batch, width}, draft.options().dtype(at::kFloat));
  const ChainCall call{batch,
                       count,
                       width,
                       type,
                       drafts.const_data_ptr(),
                       draft_means.const_data_ptr(),
                       draft_stds.const_data_ptr(),
                       target_means.const_data_ptr(),
                       target_stds.const_data_ptr(),
                       seed.const_data_ptr<int64_t>(),
                       length.mutable_data_ptr<int64_t>(),
                       sample.mutable_data_ptr<float>()};
  const DeviceScope scope(draft);
  check_launch(op, launch_verify_chain(call, scope.stream()));
  return {length, sample};
}

Cache cache_of(const Tensor& x) {
  const int64_t element = static_cast<int64_t>(x.element_size());
  return {x.mutable_data_ptr(),  x.size(3) * element,   element,
          x.stride(0) * element, x.stride(1) * element, x.stride(2) * element,
          x.stride(3) * element};
}

Tensor commit_path(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key_lengths,
                   const Tensor& path, const Tensor& length) {
  const char* op = "commit_path";
  check_commit(op, key_cache, value_cache, key_lengths, path, length);
  const int64_t batch = key_cache.size(0), capacity = key_cache.size(2);
  const auto indices = [](const Tensor& x) { return x.to(at::kLong).contiguous(); };
  const Tensor prefix = indices(key_lengths), nodes = indices(path), steps = indices(length);
  if (key_cache.numel() == 0 && value_cache.numel() == 0) return prefix + steps;
  const Tensor result = at::empty({batch}, prefix.options());
  CommitCall call{};
  call.caches[0] = cache_of(key_cache), call.caches[1] = cache_of(value_cache);
  call.batch = batch, call.heads = key_cache.size(1), call.capacity = capacity;
  call.max_depth = path.size(1);
  call.key_lengths = prefix.const_data_ptr<int64_t>();
  call.path = nodes.const_data_ptr<int64_t>();
  call.length = steps.const_data_ptr<int64_t>();
  call.new_lengths = result.mutable_data_ptr<int64_t>();
  const DeviceScope scope(key_cache);
  check_launch(op, launch_commit_path(call, scope.stream()));
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, DRIFTAR_CUDA_KEY, library) {
  library.impl("walk_tree", &walk_tree);
  library.impl("verify_tree", &verify_tree);
  library.impl("verify_chain", &verify_chain);
  library.impl("commit_path", &commit_path);
}

}  // namespace driftar::cuda
