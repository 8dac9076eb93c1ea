#pragma once

// How a block of few queries, one strip, meets a tile of keys and values. Only for kernel files.

#include "attention_few_rows.h"
#include "attention_operands.h"
#if defined(__AVX512BF16__)
#include "attention_few_values.h"
#endif

#include <algorithm>

namespace driftar::cpu {
namespace {

template <typename scalar_t>
struct FewProducts {
  using acc_t = accumulate_t<scalar_t>;
  using stored_t = stored_type<scalar_t>;
  using element_t = element_type<scalar_t>;
  static constexpr int64_t strip_rows = kFewRows<element_t>;

  const QueryBlock<scalar_t>& block;
  const AttentionShape<scalar_t>& shape;
  int64_t key_block, width, value_width;  // widths in whole vectors of what is stored
  bool fetches;  // the fewest only wait for memory, which nobody needs to ask for
  stored_t *key_buffer, *value_buffer;
  element_t* rounded;  // weights of pairs, [strip_rows, key_block]
  FewQueries<element_t> queries{};
  Rows<stored_t> keys{}, values{};
  bool guarded = false;

  FewProducts(const QueryBlock<scalar_t>& query_block, int64_t keys_per_tile,
              Scratch<acc_t>& scratch)
      : block(query_block),
        shape(query_block.shape),
        key_block(keys_per_tile),
        width(whole_vectors<stored_t>(shape.width)),
        value_width(whole_vectors<stored_t>(shape.value_width)),
        fetches(block.count() > kDotRows) {
    const int64_t stored_width = padded<stored_t>(shape.width);
    const auto take_elements = [&](int64_t count) {
      return scratch.template take_as<element_t>(elements<element_t>(count));
    };
    auto* query_buffer = scratch.template take_as<stored_t>(block.count() * stored_width);
    key_buffer = scratch.template take_as<stored_t>(key_block * stored_width);
    value_buffer =
        scratch.template take_as<stored_t>(key_block * padded<stored_t>(shape.value_width));
    rounded = kPaired<element_t> ? take_elements(strip_rows * key_block) : nullptr;
    queries = {left_operand(block.load(shape.query, shape.width, query_buffer)), block.count(),
               elements<element_t>(width), shape.scale,
               take_elements(4 * block.count() * stored_width)};
  }

  void load(const Tile& tile) {
    keys = load_rows(shape.key, block.b, block.key_head(), tile.column, tile.columns, shape.width,
                     key_buffer);
    values = load_rows(shape.value, block.b, block.key_head(), tile.column, tile.columns,
                       shape.value_width, value_buffer);
    guarded = is_partial(block, tile) && !all_finite(values, tile.columns, value_width);
  }

  // scores = scale queries keys^T, rows key_block apart.
  void multiply_keys(const Strip& strip, acc_t* scores) const {
    const int64_t step = fetches ? kFewColumns : strip.columns;
    for (int64_t c = 0; c < strip.columns; c += step) {
      const int64_t count = std::min(step, strip.columns - c);
      if (fetches) {
        prefetch(values.from(c), count, value_width);
        prefetch(keys.from(c + key_block), count, width);
      }
      queries.multiply(count, left_operand(keys.from(c)), scores + c, key_block);
    }
  }

  // out += weights values
  void multiply_values(const Strip& strip, const acc_t* weights, acc_t* out,
                       int64_t out_stride) const {
    const int64_t columns = whole_vectors<acc_t>(shape.value_width);
    const Strided<acc_t> exact{weights, key_block, 1};
    if (guarded) {
      accumulate_seen(strip.rows, columns, strip.columns, exact, values, out, out_stride);
    } else if constexpr (kPaired<element_t>) {
      narrow_rows({weights, key_block}, strip.rows, whole_vectors<acc_t>(strip.columns), rounded);
      few_values<strip_rows>(strip.rows, strip.columns, columns,
                             {rounded, elements<element_t>(key_block)}, values, out, out_stride);
    } else {
      multiply(strip.rows, columns, strip.columns, acc_t(1), exact,
               in_place(values.data, values.stride), acc_t(1), out, out_stride);
    }
  }
};

}  // namespace
}  // namespace driftar::cpu
