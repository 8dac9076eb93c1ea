// The gradient of attention as a node of PyTorch's graph. It is written in C++, unlike those of the
// other operators, because attention is called once per layer and step of a generation: the Python
// hook costs more than the smallest call computes.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace driftar::autograd {

namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using ForwardSignature = ForwardResult(const Tensor&, const Tensor&, const Tensor&,
                                       const optional<Tensor>&, const optional<Tensor>&,
                                       const optional<Tensor>&, const optional<Tensor>&,
                                       c10::SymInt, double, bool, c10::string_view, bool,
                                       c10::SymInt);
using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;
using BackwardSignature = BackwardResult(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor&, const Tensor&, const optional<Tensor>&,
                                         const optional<Tensor>&, const optional<Tensor>&,
                                         const optional<Tensor>&, const Tensor&, const Tensor&,
                                         const Tensor&, const Tensor&, const Tensor&, c10::SymInt,
                                         double, bool, c10::string_view, c10::SymInt);

const auto& forward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("driftar::attention_forward", "")
                             .typed<ForwardSignature>();
  return op;
}

const auto& backward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("driftar::attention_backward", "")
                             .typed<BackwardSignature>();
  return op;
}

// The same operator without the autograd key.
template <typename Operator, typename... Args>
auto call_below(const Operator& op, Args&&... args) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(std::forward<Args>(args)...);
}

// Forward derivatives count: PyTorch refuses them for such nodes, where a plain call would lose
// them.
template <typename... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  return (at::GradMode::is_enabled() && (tensors.requires_grad() || ...)) ||
         (tensors._fw_grad(/*level=*/0).defined() || ...);
}

optional<Tensor> optional_of(const Tensor& x) {
  return x.defined() ? optional<Tensor>(x) : std::nullopt;
}

struct Attention : torch::autograd::Function<Attention> {
  static variable_list forward(AutogradContext* context, const Tensor& query, const Tensor& key,
                               const Tensor& value, const optional<Tensor>& attn_mask,
                               const optional<Tensor>& query_offsets,
                               const optional<Tensor>& key_lengths, const optional<Tensor>& parents,
                               const c10::SymInt& query_offset, double scale, bool is_causal,
                               c10::string_view entropy, bool normalize,
                               const c10::SymInt& entropy_from) {
    auto [out, row_entropy, lse, max_score, entropy_lse, entropy_cross, entropy_norm] =
        call_below(forward_operator(), query, key, value, attn_mask, query_offsets, key_lengths,
                   parents, query_offset, scale, is_causal, entropy, normalize, entropy_from);
    const auto maybe = [](const optional<Tensor>& x) { return x.value_or(Tensor()); };
    context->save_for_backward({query, key, value, maybe(attn_mask), maybe(query_offsets),
                                maybe(key_lengths), maybe(parents), out, lse, entropy_lse,
                                entropy_cross, entropy_norm});
    context->mark_non_differentiable({max_score, entropy_lse, entropy_cross, entropy_norm});
    context->saved_data["query_offset"] = query_offset;
    context->saved_data["scale"] = scale;
    context->saved_data["is_causal"] = is_causal;
    context->saved_data["entropy"] = std::string(entropy);
    context->saved_data["entropy_from"] = entropy_from;
    return {out, row_entropy, lse, max_score, entropy_lse, entropy_cross, entropy_norm};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    auto& settings = context->saved_data;
    auto [query, key, value] = backward_operator().call(
        gradients[0], gradients[1], gradients[2], saved[0], saved[1], saved[2],
        optional_of(saved[3]), optional_of(saved[4]), optional_of(saved[5]), optional_of(saved[6]),
        saved[7], saved[8], saved[9], saved[10], saved[11], settings["query_offset"].toSymInt(),
        settings["scale"].toDouble(), settings["is_causal"].toBool(),
        settings["entropy"].toStringView(), settings["entropy_from"].toSymInt());
    variable_list result(13);
    result[0] = query, result[1] = key, result[2] = value;
    return result;
  }
};

ForwardResult attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                const optional<Tensor>& attn_mask,
                                const optional<Tensor>& query_offsets,
                                const optional<Tensor>& key_lengths,
                                const optional<Tensor>& parents, c10::SymInt query_offset,
                                double scale, bool is_causal, c10::string_view entropy,
                                bool normalize, c10::SymInt entropy_from) {
  if (!needs_gradient(query, key, value)) {
    return call_below(forward_operator(), query, key, value, attn_mask, query_offsets, key_lengths,
                      parents, std::move(query_offset), scale, is_causal, entropy, normalize,
                      std::move(entropy_from));
  }
  const variable_list x =
      Attention::apply(query, key, value, attn_mask, query_offsets, key_lengths, parents,
                       query_offset, scale, is_causal, entropy, normalize, entropy_from);
  return {x[0], x[1], x[2], x[3], x[4], x[5], x[6]};
}

// Second derivatives raise when they are taken, not when a graph for them is recorded.
struct AttentionBackward : torch::autograd::Function<AttentionBackward> {
  static variable_list forward(AutogradContext*, variable_list inputs,
                               const std::function<BackwardResult()>& call) {
    auto [query, key, value] = call();
    return {query, key, value};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "attention: second derivatives are not provided by this backend; ",
                                "use_backend('reference') computes them");
  }
};

BackwardResult attention_backward(const Tensor& grad_out, const Tensor& grad_entropy,
                                  const Tensor& grad_lse, const Tensor& query, const Tensor& key,
                                  const Tensor& value, const optional<Tensor>& attn_mask,
                                  const optional<Tensor>& query_offsets,
                                  const optional<Tensor>& key_lengths,
                                  const optional<Tensor>& parents, const Tensor& out,
                                  const Tensor& lse, const Tensor& entropy_lse,
                                  const Tensor& entropy_cross, const Tensor& entropy_norm,
                                  c10::SymInt query_offset, double scale, bool is_causal,
                                  c10::string_view entropy, c10::SymInt entropy_from) {
  const auto call = [&] {
    return call_below(backward_operator(), grad_out, grad_entropy, grad_lse, query, key, value,
                      attn_mask, query_offsets, key_lengths, parents, out, lse, entropy_lse,
                      entropy_cross, entropy_norm, query_offset, scale, is_causal, entropy,
                      entropy_from);
  };
  if (!needs_gradient(grad_out, grad_entropy, grad_lse, query, key, value)) return call();
  const variable_list x =
      AttentionBackward::apply(variable_list{grad_out, grad_entropy, grad_lse, query, key, value},
                               std::function<BackwardResult()>(call));
  return {x[0], x[1], x[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, Autograd, library) {
  library.impl("attention_forward", &attention_forward);
  library.impl("attention_backward", &attention_backward);
}

}  // namespace driftar::autograd
