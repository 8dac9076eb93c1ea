#include "attention.h"

#include "../common/attention_arguments.h"
#include "../common/dispatch.h"
#include "../common/tree_layout.h"
#include "large_blocks.h"
#include "parallel.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <type_traits>
#include <vector>

namespace driftar::cpu {

namespace {

using at::Tensor;
using std::optional;

// The best instruction set that the kernels of a dtype are built for.
template <typename scalar_t>
constexpr Isa kBestIsa = std::is_same_v<scalar_t, at::BFloat16> ? Isa::amx : Isa::avx512;

template <typename T>
Operand<const T> operand(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// Per-sample values in [low, high]: checked if `check`, clamped otherwise.
std::vector<int64_t> per_sample(const char* what, const Tensor& values, const Tensor& query,
                                int64_t low, int64_t high, bool check) {
  check_per_sample(what, values, query);
  const int64_t batch = query.size(0);
  const Tensor wide = values.to(at::kLong).contiguous();
  const int64_t* data = wide.const_data_ptr<int64_t>();
  std::vector<int64_t> result(batch);
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_VALUE(!check || (data[b] >= low && data[b] <= high), "attention: ", what,
                      " must lie in [", low, ", ", high, "], got ", data[b], " for sample ", b);
    result[b] = std::clamp(data[b], low, high);
  }
  return result;
}

// Everything that the forward and the backward call share, with the storage their pointers refer
// to.
struct Context {
  int64_t batch, query_heads, key_heads, query_length, key_length, width, value_width;
  EntropyKind entropy;
  std::vector<int64_t> lengths, offsets;
  std::vector<uint64_t> ancestors;
  Tensor mask;
  Visibility visibility;

  Context(const Tensor& query, const Tensor& key, const Tensor& value,
          const optional<Tensor>& attn_mask, const optional<Tensor>& query_offsets,
          const optional<Tensor>& key_lengths, const optional<Tensor>& parents,
          int64_t query_offset, bool is_causal, std::string_view entropy_name,
          int64_t entropy_from) {
    check_attention(query, key, value, entropy_from);
    batch = query.size(0), query_heads = query.size(1), query_length = query.size(2);
    width = query.size(3), key_heads = key.size(1), key_length = key.size(2);
    value_width = value.size(3);
    entropy = entropy_kind(entropy_name);

    int64_t nodes = 0;
    visibility = {};
    if (parents) {
      check_attention_tree(*parents, query, key_length, is_causal);
      nodes = query_length;
      const Tensor values = checked_parents("attention", *parents);
      const int64_t size = nodes * ancestor_words(nodes);
      ancestors.assign(values.size(0) * size, 0);
      for (int64_t b = 0; b < values.size(0); ++b) {
        fill_ancestors(values.const_data_ptr<int64_t>() + b * nodes, nodes,
                       ancestors.data() + b * size);
      }
      visibility.ancestors_batch = values.size(0) == 1 ? 0 : 1;
      // A tree without nodes has no queries either; the pointer only says that there is a tree.
      visibility.ancestors = nodes == 0 ? nullptr : ancestors.data();
    }
    const int64_t longest = key_length - nodes;
    lengths = key_lengths ? per_sample("key_lengths", *key_lengths, query, 0, longest, true)
                          : std::vector<int64_t>(batch, longest);
    const int64_t low = -query_length - 1;
    offsets = query_offsets
                  ? per_sample("query_offset", *query_offsets, query, low, key_length, false)
                  : std::vector<int64_t>(batch, std::clamp(query_offset, low, key_length));
    visibility.key_length = lengths.data();
    visibility.query_offset = offsets.data();
    visibility.is_causal = is_causal;
    if (attn_mask) set_mask(*attn_mask, query);
  }

  Context(const Context&) = delete;  // visibility points into this object
  Context& operator=(const Context&) = delete;

  void set_mask(const Tensor& attn_mask, const Tensor& query) {
    mask = expanded_mask(attn_mask, query, key_length);
    visibility.mask = mask.const_data_ptr();
    visibility.mask_is_bool = mask.scalar_type() == at::kBool;
    visibility.mask_batch = mask.stride(0), visibility.mask_head = mask.stride(1);
    visibility.mask_row = mask.stride(2), visibility.mask_column = mask.stride(3);
  }

  template <typename T>
  void fill(AttentionShape<T>& call, const Tensor& query, const Tensor& key, const Tensor& value,
            double scale, int64_t entropy_from) const {
    call.batch = batch, call.query_heads = query_heads, call.key_heads = key_heads;
    call.query_length = query_length, call.key_length = key_length;
    call.width = width, call.value_width = value_width;
    call.scale = static_cast<accumulate_t<T>>(scale);
    call.entropy = entropy, call.entropy_from = entropy_from;
    call.query = operand<T>(query), call.key = operand<T>(key), call.value = operand<T>(value);
    call.visibility = visibility;
  }

  bool nothing_to_do() const { return batch == 0 || query_heads == 0 || query_length == 0; }
};

template <typename T>
T* data_or_null(const Tensor& x) {
  return x.numel() == 0 ? nullptr : x.mutable_data_ptr<T>();
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                const optional<Tensor>& attn_mask,
                                const optional<Tensor>& query_offsets,
                                const optional<Tensor>& key_lengths,
                                const optional<Tensor>& parents, int64_t query_offset, double scale,
                                bool is_causal, c10::string_view entropy, bool normalize,
                                int64_t entropy_from) {
  const Context context(query, key, value, attn_mask, query_offsets, key_lengths, parents,
                        query_offset, is_causal, entropy, entropy_from);
  const auto statistics = query.options().dtype(accumulation_type(query.scalar_type()));
  const std::vector<int64_t> rows = {context.batch, context.query_heads, context.query_length};
  const std::vector<int64_t> per_row =
      context.entropy == EntropyKind::none ? std::vector<int64_t>{0} : rows;
  const std::vector<int64_t> per_entropy =
      context.entropy == EntropyKind::map ? std::vector<int64_t>{rows[0], rows[2]} : per_row;
  const Tensor out = empty_large({rows[0], rows[1], rows[2], context.value_width}, query.options());
  const Tensor lse = at::cpu::empty(rows, statistics), max_score = at::cpu::empty(rows, statistics);
  const Tensor entropy_out = at::cpu::empty(per_entropy, statistics);
  const Tensor entropy_norm = at::cpu::empty(per_entropy, statistics);
  const Tensor entropy_lse = at::cpu::empty(per_row, statistics);
  const Tensor entropy_cross = at::cpu::empty(per_row, statistics);
  const ForwardResult result{out,         entropy_out,   lse,         max_score,
                             entropy_lse, entropy_cross, entropy_norm};
  if (context.nothing_to_do()) {
    entropy_out.zero_(), entropy_norm.zero_();  // a map of no heads has entropy 0
    return result;
  }

  dispatch_floating(query.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    AttentionForward<scalar_t> call;
    context.fill(call, query, key, value, scale, entropy_from);
    call.normalize = normalize;
    call.out = data_or_null<scalar_t>(out);
    call.lse = data_or_null<acc_t>(lse), call.max_score = data_or_null<acc_t>(max_score);
    call.entropy_out = data_or_null<acc_t>(entropy_out);
    call.entropy_norm = data_or_null<acc_t>(entropy_norm);
    call.entropy_lse = data_or_null<acc_t>(entropy_lse);
    call.entropy_cross = data_or_null<acc_t>(entropy_cross);

    const bool map = context.entropy == EntropyKind::map;
    call.blocking = map ? map_blocking(call) : QueryBlocking{};
    const bool one_pass = call.blocking.rows > 0;
    if (!one_pass) call.blocking = query_blocking(call, thread_count());
    const QueryBlocking& blocking = call.blocking;
    const int64_t tasks =
        one_pass ? call.batch * blocking.row_blocks : forward_tasks(call, blocking);
    const int64_t map_tasks =
        map && !one_pass ? call.batch * blocks(call.query_length, kMapQueryBlock) : 0;
    const int64_t slot_size = one_pass
                                  ? map_forward_scratch(call)
                                  : std::max(forward_scratch(call, blocking.rows * blocking.heads,
                                                             forward_key_block(call)),
                                             map ? map_entropy_scratch(call) : int64_t{0});
    // A small call does not pay for scratch of threads that have nothing to do.
    const int64_t most_tasks = std::max(tasks, map_tasks);
    const Tensor scratch =
        empty_large({std::min(thread_count(), most_tasks), slot_size}, statistics);
    acc_t* memory = scratch.mutable_data_ptr<acc_t>();
    dispatch_isa<kBestIsa<scalar_t>>([&](auto isa) {
      using Kernel = AttentionKernel<decltype(isa)::value, scalar_t>;
      const auto run = [&](int64_t count, auto kernel) {
        parallel_for(count, [&](int64_t task, int64_t slot) {
          kernel(call, task, memory + slot * slot_size);
        });
      };
      if (one_pass) {
        run(tasks, Kernel::map_forward);
      } else {
        run(tasks, Kernel::forward);
        if (map) run(map_tasks, Kernel::map_entropy);
      }
    });
  });
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
  const Context context(query, key, value, attn_mask, query_offsets, key_lengths, parents,
                        query_offset, is_causal, entropy, entropy_from);
  const std::vector<int64_t> rows = {context.batch, context.query_heads, context.query_length};
  const bool map = context.entropy == EntropyKind::map;
  check_attention_gradients(context.entropy, query, value, grad_out, grad_entropy, grad_lse, out,
                            lse, entropy_lse, entropy_cross, entropy_norm);

  const Tensor grad_query = empty_large(query.sizes(), query.options());
  if (context.nothing_to_do() || context.key_length == 0) {
    grad_query.zero_();
    return {grad_query, at::zeros(key.sizes(), key.options()),
            at::zeros(value.sizes(), value.options())};
  }
  const auto statistics = query.options().dtype(accumulation_type(query.scalar_type()));
  const Tensor weight = context.entropy == EntropyKind::none
                            ? grad_entropy
                            : (grad_entropy * entropy_norm).contiguous();
  const Tensor saved_out = out.contiguous(), saved_lse = lse.contiguous(),
               saved_entropy_lse = entropy_lse.contiguous(),
               saved_cross = entropy_cross.contiguous(), lse_weight = grad_lse.contiguous();
  const Tensor delta = at::cpu::empty(rows, statistics);
  const Tensor grad_key = empty_large(key.sizes(), key.options());
  const Tensor grad_value = empty_large(value.sizes(), value.options());

  dispatch_floating(query.scalar_type(), [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    AttentionBackward<scalar_t> call;
    context.fill(call, query, key, value, scale, entropy_from);
    call.out = saved_out.const_data_ptr<scalar_t>();
    call.lse = saved_lse.const_data_ptr<acc_t>();
    call.entropy_lse = saved_entropy_lse.const_data_ptr<acc_t>();
    call.entropy_cross = saved_cross.const_data_ptr<acc_t>();
    call.entropy_weight = weight.const_data_ptr<acc_t>();
    call.grad_lse = lse_weight.const_data_ptr<acc_t>();
    call.delta = delta.mutable_data_ptr<acc_t>();
    call.grad_out = operand<scalar_t>(grad_out);
    call.grad_query = grad_query.mutable_data_ptr<scalar_t>();
    call.grad_key = grad_key.mutable_data_ptr<scalar_t>();
    call.grad_value = grad_value.mutable_data_ptr<scalar_t>();

    dispatch_isa<kBestIsa<scalar_t>>([&](auto isa) {
      using Kernel = AttentionKernel<decltype(isa)::value, scalar_t>;
      // A unit is what one task differentiates: the query heads of a key head, or all with "map".
      // Enough tasks share its keys to occupy every thread; each then gathers gradients of its
      // queries apart, while tasks that have a unit to themselves reuse their thread's memory.
      const int64_t units_per_sample = map ? 1 : context.key_heads;
      const int64_t units = context.batch * units_per_sample;
      const int64_t heads = context.query_heads / units_per_sample;
      const bool on_tiles = differentiates_tiles<decltype(isa)::value>(call);
      const int64_t tiles = blocks(context.key_length, BackwardBlocks(call, on_tiles).keys);
      call.splits = std::clamp<int64_t>(blocks(thread_count(), units), 1, tiles);
      const int64_t gathered = gathered_size(call, heads, on_tiles);
      // Rows that need no padding gather in the result.
      const bool in_place = std::is_same_v<scalar_t, acc_t> && call.splits == 1 &&
                            padded<acc_t>(context.width) == context.width;
      const int64_t parts = in_place ? 0 : call.splits > 1 ? call.splits * units : thread_count();
      const Tensor queries = empty_large({parts, gathered}, statistics);
      acc_t* grad_queries = nullptr;
      if constexpr (std::is_same_v<scalar_t, acc_t>) {
        if (in_place) grad_queries = call.grad_query;
      }
      if (!in_place) grad_queries = queries.mutable_data_ptr<acc_t>();
      const int64_t slot_size = backward_scratch(call, on_tiles);
      const Tensor scratch = empty_large({thread_count(), slot_size}, statistics);
      acc_t* memory = scratch.mutable_data_ptr<acc_t>();
      const auto store = [&](int64_t unit, acc_t* gradients) {
        Kernel::store_queries(call, unit / units_per_sample, unit % units_per_sample * heads, heads,
                              gradients, call.splits, units * gathered);
      };
      parallel_for(call.batch * call.query_heads,
                   [&](int64_t task, int64_t) { Kernel::row_deltas(call, task); });
      parallel_for(call.splits * units, [&](int64_t task, int64_t slot) {
        acc_t* own = grad_queries + (in_place || call.splits > 1 ? task : slot) * gathered;
        std::fill(own, own + gathered, acc_t(0));
        Kernel::backward(call, task, own, memory + slot * slot_size);
        if (call.splits == 1 && !in_place) store(task, own);
      });
      if (call.splits == 1) return;
      parallel_for(units,
                   [&](int64_t unit, int64_t) { store(unit, grad_queries + unit * gathered); });
    });
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(driftar, CPU, library) {
  library.impl("attention_forward", &attention_forward);
  library.impl("attention_backward", &attention_backward);
}

}  // namespace driftar::cpu
