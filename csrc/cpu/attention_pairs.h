#pragma once

// How a block of bf16 queries meets a tile of keys and values on AVX512-BF16: rows as they are,
// keys and values packed by pairs, weights rounded to bf16, sums in fp32. Few queries take keys and
// values as they lie. Only for kernel files compiled with it.

#include "attention_bf16.h"
#include "attention_few_rows.h"
#include "bf16_pairs.h"

#include <algorithm>

namespace driftar::cpu {
namespace {

// out[i, :] += sum_j weights[i, j] values[j, :] for VECTORS vectors of values as they lie, of which
// `columns` columns count.
template <int64_t ROWS, int64_t VECTORS>
void few_value_block(int64_t keys, int64_t columns, Rows<Bf16Pair> weights,
                     Rows<c10::BFloat16> values, float* out, int64_t out_stride) {
  using V = Vector<float>;
  using Element = Elements<Bf16Pair>;
  constexpr int64_t lanes = V::size();
  V sums[ROWS][2 * VECTORS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < 2 * VECTORS; ++c) sums[i][c] = V(0.0f);
  }
  for (int64_t j = 0; j < keys; j += 2) {
    // A last key without a neighbour meets itself, with a weight of 0.
    const c10::BFloat16 *even = values.at(j), *odd = values.at(std::min(j + 1, keys - 1));
#pragma GCC unroll 4
    for (int64_t c = 0; c < VECTORS; ++c) {
      __m512i low, high;
      interleave(_mm512_loadu_si512(even + c * 2 * lanes), _mm512_loadu_si512(odd + c * 2 * lanes),
                 low, high);
#pragma GCC unroll 8
      for (int64_t i = 0; i < ROWS; ++i) {
        const V weight = Element::spread(weights.at(i)[j / 2]);
        sums[i][2 * c] = Element::multiply_add(weight, _mm512_castsi512_ps(low), sums[i][2 * c]);
        sums[i][2 * c + 1] =
            Element::multiply_add(weight, _mm512_castsi512_ps(high), sums[i][2 * c + 1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < 2 * VECTORS; ++c) {
      if (c * lanes >= columns) continue;
      float* target = out + i * out_stride + c * lanes;
      (V::loadu(target) + sums[i][c]).store(target);
    }
  }
}

// The same for all columns and a number of rows known at run time; `width` in whole vectors of
// sums.
template <int64_t ROWS>
void few_values(int64_t rows, int64_t keys, int64_t width, Rows<Bf16Pair> weights,
                Rows<c10::BFloat16> values, float* out, int64_t out_stride) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) {
      few_values<ROWS - 1>(rows, keys, width, weights, values, out, out_stride);
      return;
    }
    constexpr int64_t lanes = Vector<c10::BFloat16>::size();
    constexpr int64_t most = ROWS <= 2 ? 4 : ROWS <= 4 ? 2 : 1;
    int64_t c = 0;
    for (; c + (most - 1) * lanes < width; c += most * lanes) {
      few_value_block<ROWS, most>(keys, width - c, weights, {values.data + c, values.stride},
                                  out + c, out_stride);
    }
    for (; c < width; c += lanes) {
      few_value_block<ROWS, 1>(keys, width - c, weights, {values.data + c, values.stride}, out + c,
                               out_stride);
    }
  }
}

struct PairProducts {
  using scalar_t = c10::BFloat16;
  static constexpr int64_t strip_rows = kGemmRows<float>;
  static constexpr int64_t written_rows(int64_t rows) { return rows; }

  const QueryBlock<scalar_t>& block;
  const AttentionShape<scalar_t>& shape;
  int64_t key_block, width, value_width;
  bool few, fetches;
  scalar_t *key_buffer, *weights;  // weights: [strip_rows, key_block]
  float* value_buffer;             // of either type: values as they are, or widened where guarded
  Bf16Pair *packed_keys, *packed_values;
  Rows<Bf16Pair> queries, keys{};
  Rows<scalar_t> values{};
  FewQueries<Bf16Pair> few_queries{};
  Tile tile{};
  bool guarded = false;

  PairProducts(const QueryBlock<scalar_t>& query_block, int64_t keys_per_tile,
               Scratch<float>& scratch)
      : block(query_block),
        shape(query_block.shape),
        key_block(keys_per_tile),
        width(padded<scalar_t>(shape.width)),
        value_width(padded<scalar_t>(shape.value_width)),
        few(block.count() <= kFewRows<Bf16Pair>),
        fetches(block.count() > kDotRows) {
    const auto take = [&](int64_t count) { return scratch.take((count + 1) / 2); };
    scalar_t* query_buffer = reinterpret_cast<scalar_t*>(take(block.count() * width));
    key_buffer = reinterpret_cast<scalar_t*>(take(key_block * width));
    weights = reinterpret_cast<scalar_t*>(take(strip_rows * key_block));
    value_buffer = scratch.take(key_block * padded<float>(shape.value_width));
    packed_keys = reinterpret_cast<Bf16Pair*>(take(key_block * width));
    packed_values = reinterpret_cast<Bf16Pair*>(take(key_block * value_width));
    queries = as_pairs(block.load(shape.query, shape.width, query_buffer));
    if (few) few_queries = {queries, block.count(), width / 2, shape.scale, packed_keys};
  }

  void load(const Tile& next, int64_t) {
    tile = next;
    const Rows<scalar_t> key_rows = load_rows(shape.key, block.b, block.key_head(), tile.column,
                                              tile.columns, shape.width, key_buffer);
    keys = as_pairs(key_rows);
    values = load_rows(shape.value, block.b, block.key_head(), tile.column, tile.columns,
                       shape.value_width, reinterpret_cast<scalar_t*>(value_buffer));
    if (!few) {
      pack_transposed(keys, tile.columns, width / 2, packed_keys);
      pack_interleaved(values, tile.columns, value_width, packed_values);
    }
    guarded = is_partial(block, tile) && !all_finite(values, tile.columns, value_width);
    if (guarded) {
      copy_rows(shape.value, block.b, block.key_head(), tile.column, tile.columns,
                shape.value_width, value_buffer);
    }
  }

  void multiply_keys(const Strip& strip, float* scores) const {
    if (!few) {
      multiply(strip.rows, whole_vectors<float>(strip.columns), (shape.width + 1) / 2, shape.scale,
               Strided<Bf16Pair>{queries.at(strip.first), queries.stride, 1},
               packed_panels(packed_keys, width / 2), 0.0f, scores, key_block);
      return;
    }
    const int64_t step = fetches ? kFewColumns : strip.columns;
    for (int64_t c = 0; c < strip.columns; c += step) {
      const int64_t count = std::min(step, strip.columns - c);
      if (fetches) {
        prefetch(values.from(c), count, value_width);
        prefetch(keys.from(c + key_block), count, width / 2);
      }
      few_queries.multiply(count, keys.from(c), scores + c, key_block);
    }
  }

  void prefetch_keys(int64_t) const {}

  void multiply_values(const Strip& strip, const float* exponentials, float* out,
                       int64_t out_stride) const {
    const int64_t columns = whole_vectors<float>(shape.value_width);
    if (guarded) {
      accumulate(strip.rows, columns, strip.columns, {exponentials, key_block, 1},
                 Rows<float>{value_buffer, padded<float>(shape.value_width)}, guarded, out,
                 out_stride);
      return;
    }
    for (int64_t r = 0; r < strip.rows; ++r) {
      narrow(exponentials + r * key_block, whole_vectors<float>(strip.columns),
             weights + r * key_block);
    }
    const Rows<Bf16Pair> pairs = as_pairs({weights, key_block});
    if (few) {
      few_values<strip_rows>(strip.rows, strip.columns, columns, pairs, values, out, out_stride);
      return;
    }
    multiply(strip.rows, columns, (strip.columns + 1) / 2, 1.0f,
             Strided<Bf16Pair>{pairs.data, pairs.stride, 1}, in_place(packed_values, value_width),
             1.0f, out, out_stride);
  }
};

}  // namespace
}  // namespace driftar::cpu
