#pragma once

// How a block of queries meets a tile of keys and values on vectors: in the accumulation type, or
// on AVX512-BF16 in pairs of bf16, with weights rounded to bf16 and sums in fp32. Only for kernel
// files.

#include "attention_few_rows.h"
#include "attention_operands.h"
#if defined(__AVX512BF16__)
#include "attention_few_values.h"
#endif

#include <algorithm>

namespace driftar::cpu {
namespace {

template <typename scalar_t>
struct VectorProducts {
  using acc_t = accumulate_t<scalar_t>;
  using stored_t = stored_type<scalar_t>;
  using element_t = element_type<scalar_t>;
  static constexpr int64_t strip_rows = kGemmRows<acc_t>;
  // Rows of memory that the products write for `rows` rows of scores or of out.
  static constexpr int64_t written_rows(int64_t rows) { return rows; }

  const QueryBlock<scalar_t>& block;
  const AttentionShape<scalar_t>& shape;
  int64_t key_block, width, value_width;  // widths in whole vectors of what is stored
  // Few queries are one strip; the fewest in fp32 only wait for memory, which nobody needs to ask
  // for.
  bool few, fetches, several_strips;
  stored_t *key_buffer, *value_buffer;
  element_t *packed_keys, *packed_values, *rounded;  // rounded: weights, [strip_rows, key_block]
  Rows<stored_t> queries, keys{};
  RightOperand<stored_t, element_t> values{};
  FewQueries<element_t> few_queries{};
  Tile tile{};
  bool guarded = false;
  int64_t coming = 0, portion = 0;  // keys of the next tile; how many of them a row asks for

  VectorProducts(const QueryBlock<scalar_t>& query_block, int64_t keys_per_tile,
                 Scratch<acc_t>& scratch)
      : block(query_block),
        shape(query_block.shape),
        key_block(keys_per_tile),
        width(whole_vectors<stored_t>(shape.width)),
        value_width(whole_vectors<stored_t>(shape.value_width)),
        few(block.count() <= kFewRows<element_t>),
        fetches(kPaired<element_t> || block.count() > kDotRows),
        several_strips(block.count() > strip_rows) {
    const int64_t stored_width = padded<stored_t>(shape.width);
    const int64_t stored_value_width = padded<stored_t>(shape.value_width);
    const auto take_elements = [&](int64_t count) {
      return scratch.template take_as<element_t>(elements<element_t>(count));
    };
    auto* query_buffer = scratch.template take_as<stored_t>(block.count() * stored_width);
    key_buffer = scratch.template take_as<stored_t>(key_block * stored_width);
    value_buffer = scratch.template take_as<stored_t>(key_block * stored_value_width);
    packed_keys = take_elements(key_block * stored_width);
    packed_values = kPaired<element_t> ? take_elements(key_block * stored_value_width) : nullptr;
    rounded = kPaired<element_t> ? take_elements(strip_rows * key_block) : nullptr;
    queries = block.load(shape.query, shape.width, query_buffer);
    if (few) {
      few_queries = {left_operand(queries), block.count(), elements<element_t>(width), shape.scale,
                     packed_keys};
    }
  }

  // Goes on to `next`, of the keys before `last`.
  void load(const Tile& next, int64_t last) {
    tile = next;
    keys = load_rows(shape.key, block.b, block.key_head(), tile.column, tile.columns, shape.width,
                     key_buffer);
    const Rows<stored_t> rows = load_rows(shape.value, block.b, block.key_head(), tile.column,
                                          tile.columns, shape.value_width, value_buffer);
    // The values, and later the next keys, are asked for in portions, so that they travel while
    // there is something to compute.
    for (int64_t c = 0; !few && c < tile.columns; c += kGemmColumns<element_t>) {
      const int64_t count = std::min(kGemmColumns<element_t>, tile.columns - c);
      prefetch(rows.from(c), count, value_width);
      transposed_operand(keys.from(c), count, shape.width, shape.scale, packed_keys + c * depth());
    }
    if (few && kPaired<element_t>) {
      values = {rows, {}};
    } else {
      values = right_operand(rows, tile.columns, shape.value_width, packed_values);
    }
    coming = !several_strips || keys.data == key_buffer
                 ? 0
                 : std::min(last - tile.column - tile.columns, key_block);
    portion = (coming + block.count() - 1) / block.count();
    guarded = is_partial(block, tile) && !all_finite(rows, tile.columns, value_width);
  }

  // scores = scale queries keys^T, rows key_block apart.
  void multiply_keys(const Strip& strip, acc_t* scores) const {
    const int64_t next = strip.first + strip.rows;
    prefetch(queries.from(next), std::min(strip_rows, block.count() - next), width);
    if (few) {
      const int64_t step = fetches ? kFewColumns : strip.columns;
      for (int64_t c = 0; c < strip.columns; c += step) {
        const int64_t count = std::min(step, strip.columns - c);
        if (fetches) {
          prefetch(values.rows.from(c), count, value_width);
          prefetch(keys.from(c + key_block), count, width);
        }
        few_queries.multiply(count, left_operand(keys.from(c)), scores + c, key_block);
      }
    } else {
      score_products(block, strip, left_operand(queries), packed_panels(packed_keys, depth()),
                     scores, key_block);
    }
  }

  // Asks for some of the next keys before row r of the block is computed.
  void prefetch_keys(int64_t r) const {
    const int64_t ahead = r * portion;
    prefetch(keys.from(tile.columns + ahead), std::min(portion, coming - ahead), width);
  }

  // out += weights values
  void multiply_values(const Strip& strip, const acc_t* weights, acc_t* out,
                       int64_t out_stride) const {
    const int64_t columns = whole_vectors<acc_t>(shape.value_width);
    const Strided<acc_t> exact{weights, key_block, 1};
    const int64_t row = elements<element_t>(key_block);
    if constexpr (kPaired<element_t>) {
      if (!guarded) {
        narrow_rows({weights, key_block}, strip.rows, whole_vectors<acc_t>(strip.columns), rounded);
      }
      if (few && !guarded) {
        few_values<strip_rows>(strip.rows, strip.columns, columns, {rounded, row}, values.rows, out,
                               out_stride);
        return;
      }
    }
    accumulate(strip.rows, columns, strip.columns, rounded_to(exact, rounded, row, 1), values,
               guarded, out, out_stride);
  }

 private:
  int64_t depth() const { return transposed_depth<stored_t, element_t>(shape.width); }
};

}  // namespace
}  // namespace driftar::cpu
