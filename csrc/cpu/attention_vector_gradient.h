#pragma once

// The backward pass on vectors: scores and their gradients have a row each. Only for kernel files.

#include "attention_gradient.h"

#include <vector>

namespace driftar::cpu {
namespace {

// p = share q and dS = scale q (share (gradient - delta) - weight (logarithm - cross)), 0 where q
// is: selected, since the value of a hidden key, its logarithm and the share may be anything.
template <typename T>
void store_gradient(const RowGradient<T>& row, T scale, Vector<T> q, Vector<T> logarithm,
                    T* probabilities, T* gradient) {
  const Vector<T> share(row.share);
  const Vector<T> pull = share * (Vector<T>::loadu(gradient) - Vector<T>(row.delta));
  const Vector<T> bend = Vector<T>(row.weight) * (logarithm - Vector<T>(row.cross));
  const Vector<T> change = Vector<T>(scale) * q * (pull - bend);
  const Vector<T> zero(T(0)), hidden = q == zero;
  Vector<T>::blendv(change, zero, hidden).store(gradient);
  Vector<T>::blendv(share * q, zero, hidden).store(probabilities);
}

// scores -> p; gradient, which holds <grad_out, v>, -> scale dS.
template <typename T>
void head_gradient(const RowGradient<T>& row, T scale, int64_t count, T* scores, T* gradient) {
  const Vector<T> offset(row.shift);
  for (int64_t j = 0; j < count; j += Vector<T>::size()) {
    const Vector<T> exponent = Vector<T>::loadu(scores + j) - offset;
    store_gradient(row, scale, exponential(exponent), exponent, scores + j, gradient + j);
  }
}

// The same from q in place of the scores, and log pi.
template <typename T>
void map_gradient(const RowGradient<T>& row, T scale, int64_t count, const T* logarithms,
                  T* probabilities, T* gradient) {
  for (int64_t j = 0; j < count; j += Vector<T>::size()) {
    store_gradient(row, scale, Vector<T>::loadu(probabilities + j),
                   Vector<T>::loadu(logarithms + j), probabilities + j, gradient + j);
  }
}

// One key head's part of a tile: operands, and the gradients that gather.
template <typename scalar_t>
struct KeyTile {
  RightOperand<stored_type<scalar_t>, element_type<scalar_t>> keys;
  Panels<element_type<scalar_t>> packed_keys, packed_values;
  bool finite;  // keys
  accumulate_t<scalar_t>*grad_keys, *grad_values;

  void expect(const AttentionShape<scalar_t>& shape, int64_t count, Upcoming& upcoming) const {
    using acc_t = accumulate_t<scalar_t>;
    using element_t = element_type<scalar_t>;
    const auto add = [&](const auto* data, int64_t width) {
      upcoming.add(Rows{data, width}, count, width);
    };
    upcoming.add(keys.rows, count, shape.width);
    add(packed_keys.data, elements<element_t>(shape.width));
    add(packed_values.data, elements<element_t>(shape.value_width));
    add(grad_keys, padded<acc_t>(shape.width));
    add(grad_values, padded<acc_t>(shape.value_width));
  }
};

// Calls of between() in a product of that size.
template <typename T>
int64_t turns(int64_t rows, int64_t columns) {
  return blocks(rows, kGemmRows<T>) * blocks(columns, kGemmColumns<T>);
}

// target[j, :] += sum_i coefficients[i, j] rows[i, :], for tiles of a block whose first rows may
// see fewer keys: row i meets the keys below seen[i].
template <typename T, typename E, typename stored_t, typename Between>
void accumulate_transposed(int64_t keys, int64_t width, int64_t queries, const int64_t* seen,
                           const Coefficients<T, E>& coefficients,
                           const RightOperand<stored_t, E>& rows, bool guarded, T* target,
                           int64_t target_stride, const Between& between) {
  static_assert(kGemmRows<T> % Elements<E>::numbers == 0);  // strips, whose rows see the same
  int64_t first = 0;
  for (int64_t key = 0; key < keys; key += kGemmRows<T>) {
    while (first < queries && seen[first] <= key) ++first;
    accumulate(std::min(kGemmRows<T>, keys - key), width, queries - first,
               coefficients.from(key, first), rows.from(first), guarded,
               target + key * target_stride, target_stride, between);
  }
}

// A task of AttentionKernel::backward.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void backward_vectors(const AttentionBackward<scalar_t>& call, int64_t task, acc_t* grad_queries,
                      acc_t* memory) {
  const bool map = call.entropy == EntropyKind::map;
  const BackwardBlocks size(call, /*tiles=*/false);
  const int64_t row_block = size.queries, key_block = size.keys;
  const BackwardTask<scalar_t> own(call, task, key_block);
  const int64_t b = own.b, heads = own.heads, key_heads = own.key_heads, group = heads / key_heads;
  // Heads whose tiles are needed together: all of them for the head-averaged map.
  const int64_t together = map ? heads : 1;
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
      const int64_t head = own.key_head + k;
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

  const auto block_of = [&](int64_t k, int64_t row) {
    const int64_t rows = std::min(row_block, call.query_length - row);
    return QueryBlock<scalar_t>{call, b, own.head + k, 1, row, rows};
  };
  const auto gradient_of = [&](const QueryBlock<scalar_t>& block) {
    return grad_queries + ((block.head - own.head) * call.query_length + block.row) * stride;
  };

  Upcoming upcoming;
  const auto between = [&] { upcoming.ask(); };
  // What differentiate() takes of a block. The parts of a single key head stay in the cache.
  const auto expect_block = [&](const QueryBlock<scalar_t>& block, const Tile& tile) {
    expect_queries(call, block, upcoming);
    upcoming.add(Rows<acc_t>{gradient_of(block), stride}, block.rows, stride);
    if (map) parts[block.key_head() - own.key_head].expect(call, tile.columns, upcoming);
  };
  // What follows the block of head k from `row` on. During the last rows every key head asks for
  // its part of the next tile.
  const auto expect_next = [&](int64_t k, int64_t row, const Tile& tile, const NextKeys& next) {
    const int64_t next_row = row + row_block;
    upcoming.clear();
    if (k + 1 < heads) {
      expect_block(block_of(k + 1, row), tile);
    } else if (next_row < call.query_length) {
      expect_block(block_of(0, next_row), tile);
    }
    if (next_row < call.query_length || k % group != 0) return;
    expect_key_gradients(call, b, own.key_head + k / group, tile, upcoming);
    expect_keys(call, next.b, next.key_head + k / group, next.tile, upcoming);
  };

  // Takes one head's block through a tile; its scores are q already when there is a map.
  const auto differentiate = [&](const QueryBlock<scalar_t>& block, const Tile& tile, bool counted,
                                 const acc_t* logarithms, acc_t* tile_scores) {
    const KeyTile<scalar_t>& part = parts[block.key_head() - own.key_head];
    const Rows<stored_t> queries = block.load(call.query, call.width, query_buffer);
    const Rows<stored_t> grad_out = block.load(call.grad_out, call.value_width, grad_out_buffer);
    const Rows<element_t> left_grad_out = left_operand(grad_out);
    const bool partial = is_partial(block, tile);
    acc_t* grad_query = gradient_of(block);
    upcoming.divide(turns<acc_t>(block.rows, tile.columns) * (logarithms == nullptr ? 2 : 1) +
                    turns<acc_t>(block.rows + 2 * tile.columns, width));
    int64_t seen[kBackwardQueryBlock] = {};
    for_each_strip(block, tile, kGemmRows<acc_t>, [&](const Strip& strip) {
      acc_t* strip_scores = tile_scores + strip.first * key_block;
      acc_t* strip_gradient = gradient + strip.first * key_block;
      const int64_t count = whole_vectors<acc_t>(strip.columns);
      if (logarithms == nullptr) {
        score_products(block, strip, left_operand(queries), part.packed_keys, strip_scores,
                       key_block, between);
        hide_keys(block, tile, strip, strip_scores, key_block);
      }
      multiply(strip.rows, count, elements<element_t>(call.value_width), acc_t(1),
               Strided<element_t>{left_grad_out.at(strip.first), left_grad_out.stride, 1},
               part.packed_values, acc_t(0), strip_gradient, key_block, between);
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
                 part.keys, partial && !part.finite, grad_query + strip.first * stride, stride,
                 between);
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
                            target_stride, between);
    };
    gather(gradient, rounded_gradient, queries, call.width, packed_queries, part.grad_keys, stride);
    gather(tile_scores, rounded_scores, grad_out, call.value_width, packed_grad_out,
           part.grad_values, value_stride);
  };

  own.for_each_tile([&](const CountedTile& tile, const NextKeys& next) {
    load_keys(tile);
    for (int64_t row = 0; row < call.query_length; row += row_block) {
      const int64_t rows = std::min(row_block, call.query_length - row);
      if (visible_end(call, b, row + rows - 1) <= tile.column) continue;
      const bool mapped = map && tile.counted;
      if (mapped) {
        std::fill(average, average + rows * key_block, acc_t(0));
        for (int64_t k = 0; k < heads; ++k) {
          const QueryBlock<scalar_t> block = block_of(k, row);
          upcoming.clear();
          if (k + 1 < heads) {
            expect(call.query, b, block.head + 1, row, rows, call.width, upcoming);
          } else {
            expect_block(block_of(0, row), tile);
          }
          upcoming.divide(turns<acc_t>(rows, tile.columns));
          map_probabilities(block, tile, call.entropy_lse + block.index(0),
                            left_operand(block.load(call.query, call.width, query_buffer)),
                            parts[k / group].packed_keys, key_block, scores + k * size.tile(),
                            average, between);
        }
        row_logarithm(average, rows * key_block);
      }
      for (int64_t k = 0; k < heads; ++k) {
        expect_next(k, row, tile, next);
        differentiate(block_of(k, row), tile, tile.counted, mapped ? average : nullptr,
                      scores + k % together * size.tile());
      }
    }
    for (int64_t k = 0; k < key_heads; ++k) {
      const int64_t first = (b * call.key_heads + own.key_head + k) * call.key_length;
      store_rows(parts[k].grad_keys, stride, tile.columns, call.width,
                 call.grad_key + (first + tile.column) * call.width);
      store_rows(parts[k].grad_values, value_stride, tile.columns, call.value_width,
                 call.grad_value + (first + tile.column) * call.value_width);
    }
  });
}

}  // namespace
}  // namespace driftar::cpu
