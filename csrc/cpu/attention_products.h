#pragma once

// How a block of queries meets a tile of keys and values: on vectors, in the accumulation type.
// Only for kernel files.

#include "attention_few_rows.h"
#include "attention_tile.h"

#include <algorithm>

namespace driftar::cpu {
namespace {

template <typename scalar_t>
struct VectorProducts {
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int64_t strip_rows = kGemmRows<acc_t>;
  // Rows of memory that the products write for `rows` rows of scores or of out.
  static constexpr int64_t written_rows(int64_t rows) { return rows; }

  const QueryBlock<scalar_t>& block;
  const AttentionShape<scalar_t>& shape;
  int64_t key_block, width, value_width;
  // Few queries are one strip; the fewest only wait for memory, which nobody needs to ask for.
  bool few, fetches, several_strips;
  acc_t *key_buffer, *value_buffer, *packed;
  Rows<acc_t> queries, keys{}, values{};
  FewQueries<acc_t> few_queries{};
  Tile tile{};
  bool guarded = false;
  int64_t coming = 0, portion = 0;  // keys of the next tile; how many of them a row asks for

  VectorProducts(const QueryBlock<scalar_t>& query_block, int64_t keys_per_tile,
                 Scratch<acc_t>& scratch)
      : block(query_block),
        shape(query_block.shape),
        key_block(keys_per_tile),
        width(whole_vectors<acc_t>(shape.width)),
        value_width(whole_vectors<acc_t>(shape.value_width)),
        few(block.count() <= kFewRows<acc_t>),
        fetches(block.count() > kDotRows),
        several_strips(block.count() > strip_rows) {
    acc_t* query_buffer = scratch.take(block.count() * padded<acc_t>(shape.width));
    key_buffer = scratch.take(key_block * padded<acc_t>(shape.width));
    value_buffer = scratch.take(key_block * padded<acc_t>(shape.value_width));
    packed = scratch.take(key_block * padded<acc_t>(shape.width));
    queries = block.load(shape.query, shape.width, query_buffer);
    if (few) few_queries = {queries, block.count(), width, shape.scale, packed};
  }

  // Goes on to `next`, of the keys before `last`.
  void load(const Tile& next, int64_t last) {
    tile = next;
    keys = load_rows(shape.key, block.b, block.key_head(), tile.column, tile.columns, shape.width,
                     key_buffer);
    values = load_rows(shape.value, block.b, block.key_head(), tile.column, tile.columns,
                       shape.value_width, value_buffer);
    // The values, and later the next keys, are asked for in portions, so that they travel while
    // there is something to compute.
    for (int64_t c = 0; !few && c < tile.columns; c += kGemmColumns<acc_t>) {
      const int64_t count = std::min(kGemmColumns<acc_t>, tile.columns - c);
      prefetch(values.from(c), count, value_width);
      pack_transposed(keys.from(c), count, shape.width, shape.scale, packed + c * shape.width);
    }
    coming = !several_strips || keys.data == key_buffer
                 ? 0
                 : std::min(last - tile.column - tile.columns, key_block);
    portion = (coming + block.count() - 1) / block.count();
    guarded = is_partial(block, tile) && !all_finite(values, tile.columns, value_width);
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
          prefetch(values.from(c), count, value_width);
          prefetch(keys.from(c + key_block), count, width);
        }
        few_queries.multiply(count, keys.from(c), scores + c, key_block);
      }
    } else {
      score_products(block, strip, queries, packed_panels(packed, shape.width), scores, key_block);
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
    accumulate(strip.rows, value_width, strip.columns, {weights, key_block, 1}, values, guarded,
               out, out_stride);
  }
};

}  // namespace
}  // namespace driftar::cpu
