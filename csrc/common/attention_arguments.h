#pragma once

// What attention asks of its arguments on every device.

#include "attention_kinds.h"
#include "checks.h"

#include <string_view>
#include <vector>

namespace driftar {

inline EntropyKind entropy_kind(std::string_view name) {
  if (name == "head") return EntropyKind::head;
  if (name == "map") return EntropyKind::map;
  TORCH_CHECK_VALUE(name == "none", "attention: entropy must be 'head', 'map' or 'none', got ",
                    name);
  return EntropyKind::none;
}

// query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv]
inline void check_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            int64_t entropy_from) {
  check_floating("attention", "query", query);
  check_rank("attention", "query", query, 4);
  check_rank("attention", "key", key, 4);
  check_rank("attention", "value", value, 4);
  check_like("attention", "key", key, query);
  check_like("attention", "value", value, query);
  const int64_t batch = query.size(0), query_heads = query.size(1), key_heads = key.size(1);
  check_shape("attention", "key", key, {batch, key_heads, key.size(2), query.size(3)});
  check_shape("attention", "value", value, {batch, key_heads, key.size(2), value.size(3)});
  TORCH_CHECK_VALUE(query_heads == key_heads || (key_heads > 0 && query_heads % key_heads == 0),
                    "attention: the heads of query must be a multiple of those of key, got ",
                    query_heads, " and ", key_heads);
  TORCH_CHECK_VALUE(entropy_from >= 0, "attention: entropy_from must be at least 0, got ",
                    entropy_from);
}

// key_lengths or query_offset [B]
inline void check_per_sample(const char* name, const at::Tensor& values, const at::Tensor& query) {
  check_integer("attention", name, values);
  check_shape("attention", name, values, {query.size(0)});
  check_device("attention", name, values, query);
}

// parents [1 | B, Lq], Lq <= Lk
inline void check_attention_tree(const at::Tensor& parents, const at::Tensor& query,
                                 int64_t key_length, bool is_causal) {
  TORCH_CHECK_VALUE(!is_causal, "attention: is_causal must be False with tree");
  check_integer("attention", "parents", parents);
  check_device("attention", "parents", parents, query);
  const int64_t batch = query.size(0), nodes = query.size(2);
  TORCH_CHECK_VALUE(parents.dim() == 2 && parents.size(1) == nodes &&
                        (parents.size(0) == 1 || parents.size(0) == batch) && nodes <= key_length,
                    "attention: parents must have shape [1 | B, Lq] with Lq <= Lk, got ",
                    parents.sizes());
}

// The mask as bool or as a statistic of query, expanded to [B, Hq, Lq, Lk].
inline at::Tensor expanded_mask(const at::Tensor& attn_mask, const at::Tensor& query,
                                int64_t key_length) {
  const bool is_bool = attn_mask.scalar_type() == at::kBool;
  TORCH_CHECK_TYPE(is_bool || at::isFloatingType(attn_mask.scalar_type()),
                   "attention: attn_mask must be bool or floating point, got ",
                   attn_mask.scalar_type());
  check_device("attention", "attn_mask", attn_mask, query);
  TORCH_CHECK_VALUE(!attn_mask.requires_grad(),
                    "attention: attn_mask must not require grad; its gradient is not provided");
  const int64_t full[4] = {query.size(0), query.size(1), query.size(2), key_length};
  bool fits = attn_mask.dim() <= 4;
  for (int64_t d = 0; d < attn_mask.dim() && fits; ++d) {
    const int64_t size = attn_mask.size(d);
    fits = size == 1 || size == full[4 - attn_mask.dim() + d];
  }
  TORCH_CHECK_VALUE(fits, "attention: attn_mask must broadcast to [B, Hq, Lq, Lk], got ",
                    attn_mask.sizes());
  const auto type = is_bool ? at::kBool : accumulation_type(query.scalar_type());
  return attn_mask.to(type).expand(full);
}

// What the backward pass gets besides the forward pass's arguments; rows are [B, Hq, Lq].
inline void check_attention_gradients(EntropyKind entropy, const at::Tensor& query,
                                      const at::Tensor& value, const at::Tensor& grad_out,
                                      const at::Tensor& grad_entropy, const at::Tensor& grad_lse,
                                      const at::Tensor& out, const at::Tensor& lse,
                                      const at::Tensor& entropy_lse,
                                      const at::Tensor& entropy_cross,
                                      const at::Tensor& entropy_norm) {
  const char* op = "attention_backward";
  const std::vector<int64_t> rows = query.sizes().slice(0, 3).vec();
  check_shape(op, "out", out, {rows[0], rows[1], rows[2], value.size(3)});
  check_shape(op, "grad_out", grad_out, out.sizes());
  check_like(op, "grad_out", grad_out, query);
  check_like(op, "out", out, query);
  check_shape(op, "grad_lse", grad_lse, rows);
  check_shape(op, "lse", lse, rows);
  const std::pair<const char*, const at::Tensor&> statistics[] = {{"grad_entropy", grad_entropy},
                                                                  {"grad_lse", grad_lse},
                                                                  {"lse", lse},
                                                                  {"entropy_lse", entropy_lse},
                                                                  {"entropy_cross", entropy_cross},
                                                                  {"entropy_norm", entropy_norm}};
  for (const auto& [name, x] : statistics) check_statistic(op, name, x, query);
  if (entropy == EntropyKind::none) return;
  check_shape(op, "entropy_lse", entropy_lse, rows);
  check_shape(op, "entropy_cross", entropy_cross, rows);
  check_shape(op, "entropy_norm", entropy_norm,
              entropy == EntropyKind::map ? std::vector<int64_t>{rows[0], rows[2]} : rows);
  check_shape(op, "grad_entropy", grad_entropy, entropy_norm.sizes());
}

}  // namespace driftar
