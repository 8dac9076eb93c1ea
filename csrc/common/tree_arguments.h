#pragma once

// What the tree operators ask of their arguments on every device; values are another matter.

#include "checks.h"

namespace driftar {

// parents [1 | B, N], for a walk of at most max_depth levels.
inline void check_tree(const char* op, const at::Tensor& parents, const at::Tensor& model,
                       int64_t max_depth) {
  TORCH_CHECK_VALUE(max_depth >= 0, op, ": max_depth must be at least 0, got ", max_depth);
  const int64_t batch = model.size(0), nodes = model.size(1);
  check_integer(op, "parents", parents);
  check_rank(op, "parents", parents, 2);
  check_device(op, "parents", parents, model);
  TORCH_CHECK_VALUE((parents.size(0) == 1 || parents.size(0) == batch) && parents.size(1) == nodes,
                    op, ": parents must hold 1 or ", batch, " trees of ", nodes,
                    " nodes, got shape ", parents.sizes());
}

// x [B, N, ...] has the nodes of the tree.
inline void check_nodes(const char* op, const char* name, const at::Tensor& x,
                        const at::Tensor& parents) {
  check_rank(op, "parents", parents, 2);
  TORCH_CHECK_VALUE(x.size(1) == parents.size(1), op, ": ", name, " must have ", parents.size(1),
                    " nodes like parents, got ", x.size(1));
}

// accept bool [B, N]
inline void check_accept(const char* op, const at::Tensor& accept, const at::Tensor& parents) {
  check_rank(op, "accept", accept, 2);
  TORCH_CHECK_TYPE(accept.scalar_type() == at::kBool, op, ": accept must be bool, got ",
                   accept.scalar_type());
  check_nodes(op, "accept", accept, parents);
}

// draft and target [B, N, D]
inline void check_drafts(const char* op, const at::Tensor& draft, const at::Tensor& target,
                         const at::Tensor& parents, double tolerance) {
  TORCH_CHECK_VALUE(tolerance >= 0, op, ": tolerance must be >= 0, got ", tolerance);
  check_floating(op, "draft", draft);
  check_rank(op, "draft", draft, 3);
  check_nodes(op, "draft", draft, parents);
  check_like(op, "target", target, draft);
  check_shape(op, "target", target, draft.sizes());
}

// draft and draft_mean [B, K, D], draft_std [B, K], target_mean [B, K + 1, D],
// target_std [B, K + 1], seed [1]
inline void check_chain(const char* op, const at::Tensor& draft, const at::Tensor& draft_mean,
                        const at::Tensor& draft_std, const at::Tensor& target_mean,
                        const at::Tensor& target_std, const at::Tensor& seed) {
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
  check_device(op, "seed", seed, draft);
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 1, op,
                    ": seed must hold one int64");
}

// Caches [B, H, Lmax, D] and [B, H, Lmax, Dv], key_lengths and length [B], path [B, max_depth].
inline void check_commit(const char* op, const at::Tensor& key_cache, const at::Tensor& value_cache,
                         const at::Tensor& key_lengths, const at::Tensor& path,
                         const at::Tensor& length) {
  check_floating(op, "key_cache", key_cache);
  check_floating(op, "value_cache", value_cache);
  check_rank(op, "key_cache", key_cache, 4);
  check_rank(op, "value_cache", value_cache, 4);
  check_rank(op, "verdict.path", path, 2);
  const int64_t batch = key_cache.size(0);
  check_shape(op, "value_cache", value_cache,
              {batch, key_cache.size(1), key_cache.size(2), value_cache.size(3)});
  check_shape(op, "key_lengths", key_lengths, {batch});
  check_shape(op, "verdict.length", length, {batch});
  check_shape(op, "verdict.path", path, {batch, path.size(1)});
  check_device(op, "value_cache", value_cache, key_cache);
  const std::pair<const char*, const at::Tensor&> caches[] = {{"key_cache", key_cache},
                                                              {"value_cache", value_cache}};
  for (const auto& [name, x] : caches) {
    TORCH_CHECK_VALUE(!x.requires_grad(), op, ": ", name,
                      " must not require grad; it is changed in place");
  }
  const std::pair<const char*, const at::Tensor&> indices[] = {
      {"key_lengths", key_lengths}, {"verdict.path", path}, {"verdict.length", length}};
  for (const auto& [name, x] : indices) {
    check_integer(op, name, x);
    check_device(op, name, x, key_cache);
  }
}

}  // namespace driftar
