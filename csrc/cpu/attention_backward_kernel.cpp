// With p = exp(s - lse), delta_i = <grad_out_i, out_i> - grad_lse_i, and over the entropy set
// q = exp(s - entropy_lse), pi = q (head) or its head average (map), c_i = sum_j q log pi:
//
//   dS_ij = p_ij (<grad_out_i, v_j> - delta_i) - w_i q_ij (log pi_ij - c_i)
//   dQ = scale dS K,   dK = scale dS^T Q,   dV = p^T grad_out
//
// w_i is the gradient of the entropy times its norm (and 1 / heads for "map"). One exponential
// serves p and q: p = q exp(entropy_lse - lse), a factor of at most 1.

#include "attention_gradient.h"
#if defined(__AMX_BF16__)
#include "attention_amx_gradient.h"
#endif

#include <vector>

namespace driftar::cpu {

namespace {

// <a, b>, b in steps of `step`.
template <typename scalar_t>
inline accumulate_t<scalar_t> dot(const scalar_t* a, const scalar_t* b, int64_t step,
                                  int64_t count) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < count; ++c) {
    sum += static_cast<acc_t>(a[c]) * static_cast<acc_t>(b[c * step]);
  }
  return sum;
}

}  // namespace

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::row_deltas(const AttentionBackward<scalar_t>& call,
                                                int64_t task) {
  const int64_t b = task / call.query_heads, h = task % call.query_heads;
  for (int64_t i = 0; i < call.query_length; ++i) {
    const int64_t index = task * call.query_length + i;
    const scalar_t* out = call.out + index * call.value_width;
    const scalar_t* grad = call.grad_out.at(b, h, i);
    // Neighbours in memory in a loop of their own, which vectorises.
    call.delta[index] =
        (call.grad_out.column == 1 ? dot(out, grad, 1, call.value_width)
                                   : dot(out, grad, call.grad_out.column, call.value_width)) -
        call.grad_lse[index];
  }
}

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::backward(const AttentionBackward<scalar_t>& call, int64_t task,
                                              acc_t* grad_queries, acc_t* memory) {
#if defined(__AMX_BF16__)
  if (differentiates_tiles<isa>(call)) return backward_tiles(call, task, grad_queries, memory);
#endif
  const bool map = call.entropy == EntropyKind::map;
  const int64_t group = call.query_heads / call.key_heads;
  const int64_t units = map ? 1 : call.key_heads;
  const int64_t split = task / (call.batch * units);
  const int64_t b = task / units % call.batch;
  const int64_t first_key_head = map ? 0 : task % units;
  const int64_t key_heads = map ? call.key_heads : 1;
  const int64_t heads = key_heads * group;
  // Heads whose tiles are needed together: all of them for the head-averaged map.
  const int64_t together = map ? heads : 1;
  const BackwardBlocks size(call, /*tiles=*/false);
  const int64_t row_block = size.queries, key_block = size.keys;
  const int64_t width = whole_vectors<acc_t>(call.width);
  const int64_t stride = padded<acc_t>(call.width);
  const int64_t value_stride = padded<acc_t>(call.value_width);

  using stored_t = stored_type<scalar_t>;
  using element_t = element_type<scalar_t>;
  constexpr bool paired = kPaired<element_t>;
  const int64_t stored_width = padded<stored_t>(call.width);
  const int64_t stored_value_width = padded<stored_t>(call.value_width);

  const auto take_stored = [](Scratch<acc_t>& from, int64_t count) {
    return from.template take_as<stored_t>(count);
  };
  const auto take_elements = [](Scratch<acc_t>& from, int64_t count) {
    return from.template take_as<element_t>(elements<element_t>(count));
  };
  Scratch<acc_t> scratch{memory};
  stored_t* query_buffer = take_stored(scratch, row_block * stored_width);
  stored_t* grad_out_buffer = take_stored(scratch, row_block * stored_value_width);
  stored_t* value_buffer = take_stored(scratch, key_block * stored_value_width);
  // Queries and gradients of out as right operands; gradients of scores and probabilities, rounded.
  element_t *packed_queries = nullptr, *packed_grad_out = nullptr;
  element_t *rounded_rows = nullptr, *rounded_gradient = nullptr, *rounded_scores = nullptr;
  if constexpr (paired) {
    packed_queries = take_elements(scratch, row_block * stored_width);
    packed_grad_out = take_elements(scratch, row_block * stored_value_width);
    rounded_rows = take_elements(scratch, kGemmRows<acc_t> * key_block);
    rounded_gradient = take_elements(scratch, size.tile());
    rounded_scores = take_elements(scratch, size.tile());
  }
  acc_t* scores = scratch.take(together * size.tile());
  acc_t* gradient = scratch.take(size.tile());
  acc_t* average = scratch.take(size.tile());
  std::vector<KeyTile<scalar_t>> parts(key_heads);

  const auto load_keys = [&](const Tile& tile) {
    Scratch<acc_t> pieces = scratch;
    for (int64_t k = 0; k < key_heads; ++k) {
      KeyTile<scalar_t>& part = parts[k];
      const int64_t head = first_key_head + k;
      const Rows<stored_t> keys =
          load_rows(call.key, b, head, tile.column, tile.columns, call.width,
                    take_stored(pieces, key_block * stored_width));
      const Rows<stored_t> values =
          load_rows(call.value, b, head, tile.column, tile.columns, call.value_width, value_buffer);
      part.keys = right_operand(keys, tile.columns, call.width,
                                paired ? take_elements(pieces, key_block * stored_width) : nullptr);
      part.packed_keys = transposed_operand(keys, tile.columns, call.width, call.scale,
                                            take_elements(pieces, key_block * stored_width));
      part.packed_values =
          transposed_operand(values, tile.columns, call.value_width, acc_t(1),
                             take_elements(pieces, key_block * stored_value_width));
      part.finite = all_finite(keys, tile.columns, width);
      part.grad_keys = pieces.take(key_block * stride);
      part.grad_values = pieces.take(key_block * value_stride);
      std::fill(part.grad_keys, part.grad_keys + tile.columns * stride, acc_t(0));
      std::fill(part.grad_values, part.grad_values + tile.columns * value_stride, acc_t(0));
    }
  };

  // Takes one head's block through a tile; its scores are q already when there is a map.
  const auto differentiate = [&](const QueryBlock<scalar_t>& block, const Tile& tile, bool counted,
                                 const acc_t* logarithms, acc_t* tile_scores) {
    const KeyTile<scalar_t>& part = parts[block.key_head() - first_key_head];
    const Rows<stored_t> queries = block.load(call.query, call.width, query_buffer);
    const Rows<stored_t> grad_out = block.load(call.grad_out, call.value_width, grad_out_buffer);
    const Rows<element_t> left_grad_out = left_operand(grad_out);
    const bool partial = is_partial(block, tile);
    acc_t* grad_query =
        grad_queries +
        ((block.head - first_key_head * group) * call.query_length + block.row) * stride;
    int64_t seen[kBackwardQueryBlock] = {};
    for_each_strip(block, tile, kGemmRows<acc_t>, [&](const Strip& strip) {
      acc_t* strip_scores = tile_scores + strip.first * key_block;
      acc_t* strip_gradient = gradient + strip.first * key_block;
      const int64_t count = whole_vectors<acc_t>(strip.columns);
      if (logarithms == nullptr) {
        score_products(block, strip, left_operand(queries), part.packed_keys, strip_scores,
                       key_block);
        hide_keys(block, tile, strip, strip_scores, key_block);
      }
      multiply(strip.rows, count, elements<element_t>(call.value_width), acc_t(1),
               Strided<element_t>{left_grad_out.at(strip.first), left_grad_out.stride, 1},
               part.packed_values, acc_t(0), strip_gradient, key_block);
      for (int64_t r = 0; r < strip.rows; ++r) {
        const RowGradient<acc_t> row = row_gradient(call, block, strip.first + r, counted);
        acc_t* row_scores = strip_scores + r * key_block;
        acc_t* row_gradient = strip_gradient + r * key_block;
        if (logarithms == nullptr) {
          head_gradient(row, call.scale, count, row_scores, row_gradient);
        } else {
          map_gradient(row, call.scale, count, logarithms + (strip.first + r) * key_block,
                       row_scores, row_gradient);
        }
        // The transposed products take a few keys beyond the last visible one.
        const int64_t reach =
            std::min(whole_vectors<acc_t>(strip.columns + kGemmRows<acc_t>), key_block);
        if (reach > count) {
          std::fill(row_scores + count, row_scores + reach, acc_t(0));
          std::fill(row_gradient + count, row_gradient + reach, acc_t(0));
        }
        seen[strip.first + r] = strip.columns;
      }
      const Strided<acc_t> exact{strip_gradient, key_block, 1};
      if constexpr (paired) {
        const int64_t reach =
            std::min(whole_vectors<acc_t>(strip.columns + kGemmRows<acc_t>), key_block);
        narrow_rows({strip_gradient, key_block}, strip.rows, count, rounded_rows);
        const int64_t first = strip.first / 2 * key_block;
        narrow_interleaved({strip_gradient, key_block}, strip.rows, reach,
                           rounded_gradient + first);
        narrow_interleaved({strip_scores, key_block}, strip.rows, reach, rounded_scores + first);
      }
      accumulate(strip.rows, width, strip.columns,
                 rounded_to(exact, rounded_rows, elements<element_t>(key_block), int64_t{1}),
                 part.keys, partial && !part.finite, grad_query + strip.first * stride, stride);
    });
    const auto gather = [&](const acc_t* coefficients, element_t* rounded, Rows<stored_t> rows,
                            int64_t row_width, element_t* packed, acc_t* target,
                            int64_t target_stride) {
      const int64_t columns = whole_vectors<acc_t>(row_width);
      const Strided<acc_t> exact{coefficients, 1, key_block};
      accumulate_transposed(tile.columns, columns, block.rows, seen,
                            rounded_to(exact, rounded, int64_t{1}, key_block),
                            right_operand(rows, block.rows, row_width, packed),
                            partial && !all_finite(rows, block.rows, columns), target,
                            target_stride);
    };
    gather(gradient, rounded_gradient, queries, call.width, packed_queries, part.grad_keys, stride);
    gather(tile_scores, rounded_scores, grad_out, call.value_width, packed_grad_out,
           part.grad_values, value_stride);
  };

  const auto process = [&](const Tile& tile, bool counted) {
    load_keys(tile);
    for (int64_t row = 0; row < call.query_length; row += row_block) {
      const int64_t rows = std::min(row_block, call.query_length - row);
      if (visible_end(call, b, row + rows - 1) <= tile.column) continue;
      const auto block_of = [&](int64_t k) {
        return QueryBlock<scalar_t>{call, b, first_key_head * group + k, 1, row, rows};
      };
      const bool mapped = map && counted;
      if (mapped) {
        std::fill(average, average + rows * key_block, acc_t(0));
        for (int64_t k = 0; k < heads; ++k) {
          const QueryBlock<scalar_t> block = block_of(k);
          map_probabilities(block, tile, call.entropy_lse + block.index(0),
                            left_operand(block.load(call.query, call.width, query_buffer)),
                            parts[k / group].packed_keys, key_block, scores + k * size.tile(),
                            average);
        }
        row_logarithm(average, rows * key_block);
      }
      for (int64_t k = 0; k < heads; ++k) {
        differentiate(block_of(k), tile, counted, mapped ? average : nullptr,
                      scores + k % together * size.tile());
      }
    }
    for (int64_t k = 0; k < key_heads; ++k) {
      const int64_t first = (b * call.key_heads + first_key_head + k) * call.key_length;
      store_rows(parts[k].grad_keys, stride, tile.columns, call.width,
                 call.grad_key + (first + tile.column) * call.width);
      store_rows(parts[k].grad_values, value_stride, tile.columns, call.value_width,
                 call.grad_value + (first + tile.column) * call.value_width);
    }
  };

  for_each_key_tile(call, key_block, split, process);
}

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::store_queries(const AttentionBackward<scalar_t>& call,
                                                   int64_t b, int64_t head, int64_t heads,
                                                   acc_t* grad_queries, int64_t parts,
                                                   int64_t part_stride) {
  const bool tiles = differentiates_tiles<isa>(call);
  for (int64_t part = 1; part < parts; ++part) {
    const acc_t* other = grad_queries + part * part_stride;
    for (int64_t i = 0; i < gathered_size(call, heads, tiles); ++i) grad_queries[i] += other[i];
  }
  scalar_t* target =
      call.grad_query + (b * call.query_heads + head) * call.query_length * call.width;
#if defined(__AMX_BF16__)
  if (tiles) return store_transposed_queries(call, heads, grad_queries, target);
#endif
  store_rows(grad_queries, padded<acc_t>(call.width), heads * call.query_length, call.width,
             target);
}

}  // namespace driftar::cpu

#include "attention_instances.h"
