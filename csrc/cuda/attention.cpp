#include "attention_forward_plan.h"

#include "../common/attention_arguments.h"
#include "device.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

namespace driftar::cuda {

namespace {

using at::Tensor;
using std::optional;

Operand operand_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1),
          x.stride(2),        x.stride(3), moves_in_vectors(x)};
}

GpuTraits gpu_of(const Tensor& x) {
  const auto attribute = [&](cudaDeviceAttr name) {
    return device_attribute("attention", x, name);
  };
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor) +
              attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount)};
}

// A call, checked, with the tensors that its pointers refer to.
class Problem {
 public:
  Problem(const Tensor& query, const Tensor& key, const Tensor& value,
          const optional<Tensor>& attn_mask, const optional<Tensor>& query_offsets,
          const optional<Tensor>& key_lengths, const optional<Tensor>& parents,
          int64_t query_offset, double scale, bool is_causal, std::string_view entropy,
          int64_t entropy_from)
      : scope_(query) {
    check_attention(query, key, value, entropy_from);
    for (const Tensor& x : {query, value}) {
      TORCH_CHECK_NOT_IMPLEMENTED(x.size(3) <= kMaxWidth,
                                  "attention: head dimensions must be at most ", kMaxWidth,
                                  " on this backend, got ", x.size(3));
    }
    shape.type = scalar_of("attention", "query", query);
    shape.entropy = entropy_kind(entropy);
    shape.is_causal = is_causal;
    shape.width = static_cast<int>(query.size(3));
    shape.value_width = static_cast<int>(value.size(3));
    shape.batch = query.size(0), shape.query_heads = query.size(1), shape.key_heads = key.size(1);
    const int64_t query_length = query.size(2), key_length = key.size(2);
    TORCH_CHECK_NOT_IMPLEMENTED(
        query_length <= kMaxLength && key_length <= kMaxLength, "attention: there must be at most ",
        kMaxLength, " queries and keys on this backend, got ", query_length, " and ", key_length);
    shape.query_length = static_cast<int>(query_length);
    shape.key_length = static_cast<int>(key_length);
    shape.query_offset = static_cast<int>(std::clamp(query_offset, -query_length - 1, key_length));
    shape.entropy_from = static_cast<int>(std::min(entropy_from, key_length));
    shape.scale = static_cast<float>(scale);
    shape.query = operand_of(query), shape.key = operand_of(key), shape.value = operand_of(value);
    if (query_offsets) {
      shape.query_offsets = per_sample("query_offset", *query_offsets, query, query_offsets_);
    }
    if (key_lengths) shape.key_lengths = per_sample("key_lengths", *key_lengths, query, lengths_);
    if (parents) pack_ancestors(*parents, query);
    if (attn_mask) set_mask(*attn_mask, query);
  }

  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  cudaStream_t stream() const { return scope_.stream(); }
  bool nothing_to_do() const {
    return shape.batch == 0 || shape.query_heads == 0 || shape.query_length == 0;
  }

  AttentionShape shape{};

 private:
  static const int64_t* per_sample(const char* name, const Tensor& values, const Tensor& query,
                                   Tensor& kept) {
    check_per_sample(name, values, query);
    kept = values.to(at::kLong).contiguous();
    return kept.const_data_ptr<int64_t>();
  }

  void pack_ancestors(const Tensor& parents, const Tensor& query) {
    check_attention_tree(parents, query, shape.key_length, shape.is_causal);
    const int64_t nodes = shape.query_length;
    const Tensor values = parents.to(at::kLong).contiguous();
    const int64_t trees = values.size(0);
    shape.words = static_cast<int>(ancestor_words(nodes));
    ancestors_ = at::empty({trees, nodes, shape.words}, values.options().dtype(at::kInt));
    auto* bits = reinterpret_cast<uint32_t*>(ancestors_.mutable_data_ptr<int>());
    const AncestorCall call{trees, nodes, values.const_data_ptr<int64_t>(), bits};
    check_launch("attention", launch_ancestors(call, stream()));
    shape.ancestors = bits;
    shape.ancestors_stride = trees == 1 ? 0 : nodes * shape.words;
  }

  void set_mask(const Tensor& attn_mask, const Tensor& query) {
    mask_ = expanded_mask(attn_mask, query, shape.key_length);
    shape.mask = {mask_.scalar_type() == at::kBool ? MaskKind::boolean : MaskKind::additive,
                  mask_.const_data_ptr(),
                  mask_.stride(0),
                  mask_.stride(1),
                  mask_.stride(2),
                  mask_.stride(3)};
  }

  DeviceScope scope_;
  Tensor query_offsets_, lengths_, ancestors_, mask_;
};

float* floats(const Tensor& x) { return x.numel() == 0 ? nullptr : x.mutable_data_ptr<float>(); }

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                const optional<Tensor>& attn_mask,
                                const optional<Tensor>& query_offsets,
                                const optional<Tensor>& key_lengths,
                                const optional<Tensor>& parents, int64_t query_offset, double scale,
                                bool is_causal, c10::string_view entropy, bool normalize,
                                int64_t entropy_from) {
  const char* op = "attention";
  const Problem problem(query, key, value, attn_mask, query_offsets, key_lengths, parents,
                        query_offset, scale, is_causal, entropy, entropy_from);
  const AttentionShape& shape = problem.shape;
  const auto statistics = query.options().dtype(at::kFloat);
  const std::vector<int64_t> rows = {shape.batch, shape.query_heads, shape.query_length};
  const std::vector<int64_t> per_row =
      shape.entropy == EntropyKind::none ? std::vector<int64_t>{0} : rows;
  const std::vector<int64_t> per_entropy =
      shape.entropy == EntropyKind::map ? std::vector<int64_t>{rows[0], rows[2]} : per_row;
  const Tensor out = at::empty({rows[0], rows[1], rows[2], shape.value_width}, query.options());
  const Tensor lse = at::empty(rows, statistics), max_score = at::empty(rows, statistics);
  const Tensor entropy_out = at::empty(per_entropy, statistics);
  const Tensor entropy_norm = at::empty(per_entropy, statistics);
  const Tensor entropy_lse = at::empty(per_row, statistics);
  const Tensor entropy_cross = at::empty(per_row, statistics);
  const ForwardResult result{out,         entropy_out,   lse,         max_score,
                             entropy_lse, entropy_cross, entropy_norm};
  if (problem.nothing_to_do()) {
    entropy_out.zero_(), entropy_norm.zero_();  // a map of no heads has entropy 0
    return result;
  }
  AttentionForward call{};
  static_cast<AttentionShape&>(call) = shape;
  call.normalize = normalize;
  call.out = out.mutable_data_ptr();
  call.lse = floats(lse), call.max_score = floats(max_score);
  call.entropy_out = floats(entropy_out), call.entropy_norm = floats(entropy_norm);
  call.entropy_lse = floats(entropy_lse), call.entropy_cross = floats(entropy_cross);
  const ForwardPlan plan = plan_forward(shape, gpu_of(query));
  call.splits = plan.split.splits, call.split_keys = plan.split.keys;
  std::vector<Tensor> copies;  // live as long as the launches
  const auto make_bulk = [&](Operand& operand, const Tensor& x) {
    if (copies_in_bulk(operand, x.size(0), x.size(1), x.size(2))) return;
    copies.push_back(x.clone(at::MemoryFormat::Contiguous));
    operand = operand_of(copies.back());
  };
  if (plan.hopper) {
    make_bulk(call.query, query), make_bulk(call.key, key), make_bulk(call.value, value);
  }
  Tensor partial_out, partial;
  if (call.splits > 1) {
    partial_out = at::empty({call.splits, lse.numel(), shape.value_width}, statistics);
    partial = at::empty({call.splits, kStatistics, lse.numel()}, statistics);
    call.partial_out = floats(partial_out), call.partial = floats(partial);
  }
  check_launch(op, plan.hopper ? launch_attention_forward_hopper(call, problem.stream())
                               : launch_attention_forward(call, problem.stream()));
  if (call.splits > 1) check_launch(op, launch_attention_merge(call, problem.stream()));
  if (shape.entropy == EntropyKind::map) {
    check_launch(op, launch_attention_map(call, problem.stream()));
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& grad_entropy, const Tensor& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const optional<Tensor>& attn_mask,
    const optional<Tensor>& query_offsets, const optional<Tensor>& key_lengths,
    const optional<Tensor>& parents, const Tensor& out, const Tensor& lse,
    const Tensor& entropy_lse, const Tensor& entropy_cross, const Tensor& entropy_norm,
    int64_t query_offset, double scale, bool is_causal, c10::string_view entropy,
    int64_t entropy_from) {
  const char* op = "attention_backward";
  const Problem problem(query, key, value, attn_mask, query_offsets, key_lengths, parents,
                        query_offset, scale, is_causal, entropy, entropy_from);
  const AttentionShape& shape = problem.shape;
  const std::vector<int64_t> rows = {shape.batch, shape.query_heads, shape.query_length};
  check_attention_gradients(shape.entropy, query, value, grad_out, grad_entropy, grad_lse, out, lse,
                            entropy_lse, entropy_cross, entropy_norm);
  if (problem.nothing_to_do() || shape.key_length == 0) {
    return {at::zeros(query.sizes(), query.options()), at::zeros(key.sizes(), key.options()),
            at::zeros(value.sizes(), value.options())};
  }
  const Tensor grad_query = at::empty(query.sizes(), query.options());
  const Tensor grad_key = at::empty(key.sizes(), key.options());
  const Tensor grad_value = at::empty(value.sizes(), value.options());
  const Tensor weight = shape.entropy == EntropyKind::none
                            ? grad_entropy
                            : (grad_entropy * entropy_norm).contiguous();
  const Tensor saved_out = out.contiguous(), saved_lse = lse.contiguous(),
               saved_entropy_lse = entropy_lse.contiguous(),
               saved_cross = entropy_cross.contiguous(), lse_weight = grad_lse.contiguous();
  const Tensor delta = at::empty(rows, lse.options());
  AttentionBackward call{};
  static_cast<AttentionShape&>(call) = shape;
  call.grad_out = operand_of(grad_out);
  call.out = saved_out.const_data_ptr();
  call.lse = saved_lse.const_data_ptr<float>(), call.grad_lse = lse_weight.const_data_ptr<float>();
  call.entropy_lse = saved_entropy_lse.const_data_ptr<float>();
  call.entropy_cross = saved_cross.const_data_ptr<float>();
  call.entropy_weight = weight.const_data_ptr<float>();
  call.delta = delta.mutable_data_ptr<float>();
  call.grad_query = grad_query.mutable_data_ptr();
  call.grad_key = grad_key.mutable_data_ptr();
  call.grad_value = grad_value.mutable_data_ptr();
  check_launch(op, launch_attention_backward(call, problem.stream()));
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, DRIFTAR_CUDA_KEY, library) {
  library.impl("attention_forward", &attention_forward);
  library.impl("attention_backward", &attention_backward);
}

}  // namespace driftar::cuda
