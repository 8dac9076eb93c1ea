#pragma once

// The products of a block of many queries on vectors: queries are packed once, transposed, and out
// gathers in rows. Only for kernel files.

#include "attention_weights.h"

namespace driftar::cpu {
namespace {

template <typename scalar_t>
class ColumnProducts {
  using acc_t = accumulate_t<scalar_t>;
  using stored_t = stored_type<scalar_t>;
  using element_t = element_type<scalar_t>;
  static constexpr int64_t group = kGroup<acc_t>, lanes = Vector<acc_t>::size();

  const QueryBlock<scalar_t>& block;
  const AttentionShape<scalar_t>& shape;
  const int64_t depth;  // of a packed query
  const int64_t value_width, out_stride;
  stored_t *key_buffer, *value_buffer;
  element_t* queries;
  element_t *packed_values = nullptr, *rounded = nullptr;  // of pairs: values, weights of a tile
  acc_t* out;

  Rows<stored_t> keys{}, value_rows{};
  RightOperand<stored_t, element_t> values{};
  bool guarded = false;

 public:
  static constexpr int64_t kStep = kStepKeys;  // keys that the products take at a time, at most

  ColumnProducts(const QueryBlock<scalar_t>& query_block, int64_t key_block,
                 Scratch<acc_t>& scratch)
      : block(query_block),
        shape(query_block.shape),
        depth(transposed_depth<stored_t, element_t>(shape.width)),
        value_width(whole_vectors<acc_t>(shape.value_width)),
        out_stride(padded<acc_t>(shape.value_width)) {
    const int64_t rows = block.count();
    const int64_t stored_width = padded<stored_t>(shape.width);
    const int64_t stored_value_width = padded<stored_t>(shape.value_width);
    auto* query_buffer = scratch.template take_as<stored_t>(rows * stored_width);
    key_buffer = scratch.template take_as<stored_t>(key_block * stored_width);
    value_buffer = scratch.template take_as<stored_t>(key_block * stored_value_width);
    queries = scratch.template take_as<element_t>(whole_groups<acc_t>(rows) * depth);
    if constexpr (kPaired<element_t>) {
      packed_values =
          scratch.template take_as<element_t>(key_block * elements<element_t>(stored_value_width));
      rounded = scratch.template take_as<element_t>(group * elements<element_t>(key_block));
    }
    out = scratch.take(rows * out_stride);
    std::fill_n(out, rows * out_stride, acc_t(0));
    transposed_operand(block.load(shape.query, shape.width, query_buffer), rows, shape.width,
                       shape.scale, queries);
  }

  // What multiply_keys() gives is in this unit.
  acc_t unit() const { return acc_t(1); }

  void load(const Tile& tile) {
    keys = load_rows(shape.key, block.b, block.key_head(), tile.column, tile.columns, shape.width,
                     key_buffer);
    value_rows = load_rows(shape.value, block.b, block.key_head(), tile.column, tile.columns,
                           shape.value_width, value_buffer);
    guarded = is_partial(block, tile) &&
              !all_finite(value_rows, tile.columns, whole_vectors<stored_t>(shape.value_width));
    values = right_operand(value_rows, tile.columns, shape.value_width, packed_values);
  }

  // Calls of between() for a group and so many keys.
  int64_t turns(int64_t count) const {
    constexpr int64_t height = kGemmRows<acc_t>;
    return blocks(count, height) +
           blocks(count, kStep) * blocks(group, height) * blocks(value_width, group);
  }

  // scores[key, lane] of a group and of strip.columns keys from `key` of the tile on
  template <typename Between>
  void multiply_keys(const Strip& strip, int64_t key, acc_t* scores, const Between& between) const {
    const Rows<element_t> left = left_operand(keys.from(key));
    multiply(strip.columns, strip.rows <= lanes ? lanes : group, elements<element_t>(shape.width),
             kPaired<element_t> ? shape.scale : acc_t(1),
             Strided<element_t>{left.data, left.stride, 1},
             in_place(queries + strip.first * depth, group), acc_t(0), scores, group, between);
  }

  // out *= factors, one a query
  void shrink(const Strip& strip, const acc_t* factors) {
    for (int64_t r = 0; r < strip.rows; ++r) {
      if (factors[r] == acc_t(1)) continue;
      const Vector<acc_t> factor(factors[r]);
      acc_t* row = out + (strip.first + r) * out_stride;
      for (int64_t c = 0; c < value_width; c += lanes) {
        (Vector<acc_t>::loadu(row + c) * factor).store(row + c);
      }
    }
  }

  // Where the exponentials of a group go. With `keep` also in place of the scores.
  StoreWeights<element_t> weights(acc_t* scores, bool keep) const {
    return {scores, keep || guarded, rounded};
  }

  // out += weights values, for the last weights(); `weights`: as they are, where they were stored
  template <typename Between>
  void multiply_values(const Strip& strip, int64_t key, const acc_t* weights,
                       const Between& between) {
    accumulate(strip.rows, value_width, strip.columns,
               rounded_to(Strided<acc_t>{weights, 1, group}, rounded, 1, group), values.from(key),
               guarded, out + strip.first * out_stride, out_stride, between);
  }

  // Stores out times `factors` of a group's rows.
  void store(const AttentionForward<scalar_t>& call, int64_t first, int64_t count,
             const acc_t* factors) const {
    scalar_t* target = call.out + block.index(first) * call.value_width;  // the others follow
    for (int64_t r = 0; r < count; ++r, target += call.value_width) {
      store_scaled(out + (first + r) * out_stride, call.value_width, factors[r], target);
    }
  }
};

}  // namespace
}  // namespace driftar::cpu
