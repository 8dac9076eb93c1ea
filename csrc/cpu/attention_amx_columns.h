#pragma once

// The products of a block of many bf16 queries on AMX. Keys multiply as they lie; queries are
// packed once, values once per block, both transposed, and out gathers transposed, so that a query
// is a lane everywhere. Only for kernel files compiled with AMX.

#include "attention_amx.h"
#include "attention_weights.h"

namespace driftar::cpu {
namespace {

template <typename scalar_t>
class ColumnProducts {
  static constexpr int64_t group = kGroup<float>, lanes = Vector<float>::size();

  TileRegisters registers;
  const QueryBlock<scalar_t>& block;
  const AttentionShape<scalar_t>& shape;
  const int64_t width, value_width;  // padded to a tile's depth
  const float scale_unit;
  scalar_t *key_buffer, *value_buffer, *packed_values, *rounded_out;
  Bf16Pair *queries, *rounded;
  float* out;  // [groups, value_width, group]

  Rows<scalar_t> keys{}, value_rows{}, last_keys{};
  int64_t whole_keys = 0;  // of the tile, in whole tiles of A
  Tiles values{nullptr, 0, 0, 0};
  bool guarded = false;

 public:
  static constexpr int64_t kStep = kTileStepKeys;  // keys that the products take at a time, at most

  ColumnProducts(const QueryBlock<scalar_t>& query_block, int64_t key_block,
                 Scratch<float>& scratch)
      : block(query_block),
        shape(query_block.shape),
        width(padded<scalar_t>(shape.width)),
        value_width(padded<scalar_t>(shape.value_width)),
        scale_unit(score_unit(shape)) {
    const int64_t rows = block.count(), padded_rows = whole_groups<float>(rows);
    auto* query_buffer = scratch.take_as<scalar_t>(rows * width);
    key_buffer = scratch.take_as<scalar_t>(key_block * width);
    value_buffer = scratch.take_as<scalar_t>(key_block * value_width);
    packed_values =
        scratch.take_as<scalar_t>(tiles(key_block, kTileDepth) * kTileDepth * value_width);
    rounded_out = scratch.take_as<scalar_t>(group * value_width);
    queries = scratch.take_as<Bf16Pair>(padded_rows * width / 2);
    rounded = scratch.take_as<Bf16Pair>(group * kStep / 2);
    out = scratch.take(padded_rows * value_width);
    std::fill_n(out, padded_rows * value_width, 0.0f);
    pack_transposed(as_pairs(block.load(shape.query, shape.width, query_buffer)), rows, width / 2,
                    queries);
  }

  // What multiply_keys() gives is in this unit.
  float unit() const { return scale_unit; }

  void load(const Tile& tile) {
    keys = load_rows(shape.key, block.b, block.key_head(), tile.column, tile.columns, shape.width,
                     key_buffer);
    value_rows = load_rows(shape.value, block.b, block.key_head(), tile.column, tile.columns,
                           shape.value_width, value_buffer);
    guarded = is_partial(block, tile) && !all_finite(value_rows, tile.columns, value_width);
    values = pack_transposed_tiles(value_rows, tile.columns, value_width, packed_values);
    // The last tile of A would read behind the keys.
    whole_keys = tile.columns / kTileRows * kTileRows;
    last_keys = keys.from(whole_keys);
    if (keys.data != key_buffer && whole_keys < tile.columns) {
      last_keys = copy_rows(shape.key, block.b, block.key_head(), tile.column + whole_keys,
                            tile.columns - whole_keys, shape.width, key_buffer);
    }
  }

  // Calls of between() for a group and so many keys.
  int64_t turns(int64_t count) const {
    constexpr int64_t height = 2 * kTileRows;
    return tiles(count, height) + tiles(count, kStep) * tiles(value_width, height);
  }

  // scores[key, lane] of a group and of strip.columns keys from `key` of the tile on
  template <typename Between>
  void multiply_keys(const Strip& strip, int64_t key, float* scores, const Between& between) const {
    const Tiles right = group_tiles(queries + strip.first * width / 2);
    const int64_t columns = tiles(strip.rows, kTileColumns), depth = width / kTileDepth;
    const int64_t in_place =
        std::min(tiles(strip.columns, kTileRows) * kTileRows, whole_keys - key);
    multiply_tiles(in_place / kTileRows, columns, depth, left_tiles(keys.from(key)), right,
                   /*add=*/false, scores, group, between);
    if (strip.columns > in_place) {
      multiply_tiles(1, columns, depth, left_tiles(last_keys), right, /*add=*/false,
                     scores + in_place * group, group, between);
    }
    if (scale_unit != shape.scale) scale_columns(shape.scale, strip.columns, scores);
  }

  // out *= factors, one a query
  void shrink(const Strip& strip, const float* factors) {
    float* sums = out + strip.first * value_width;
    for (int64_t lane = 0; lane < strip.rows; lane += lanes) {
      const Vector<float> factor = Vector<float>::loadu(factors + lane);
      for (int64_t c = 0; c < shape.value_width; ++c) {
        (Vector<float>::loadu(sums + c * group + lane) * factor).store(sums + c * group + lane);
      }
    }
  }

  // Where the exponentials of a group go. With `keep` also in place of the scores.
  StoreWeights<Bf16Pair> weights(float* scores, bool keep) const {
    return {scores, keep || guarded, rounded};
  }

  // out += weights values, for the last weights(); `exact`: as they are, where they were stored
  template <typename Between>
  void multiply_values(const Strip& strip, int64_t key, const float* exact,
                       const Between& between) {
    float* sums = out + strip.first * value_width;
    if (guarded) {
      accumulate_seen_columns(strip.columns, shape.value_width, exact, value_rows.from(key), sums);
      return;
    }
    fill_group(strip.columns, rounded);
    multiply_tiles(tiles(shape.value_width, kTileRows), tiles(strip.rows, kTileColumns),
                   tiles(strip.columns, kTileDepth), values.deeper(key / kTileDepth),
                   group_tiles(rounded), /*add=*/true, sums, group, between);
  }

  // Stores out times `factors` of a group's rows.
  void store(const AttentionForward<scalar_t>& call, int64_t first, int64_t count,
             const float* factors) const {
    const float* sums = out + first * value_width;
    scalar_t* target = call.out + block.index(first) * call.value_width;  // the others follow
    const bool in_place = count == group && value_width == call.value_width;
    store_transposed(
        shape.value_width, count,
        [&](int64_t c, int64_t lane) {
          return _mm512_mul_ps(_mm512_loadu_ps(sums + c * group + lane),
                               _mm512_loadu_ps(factors + lane));
        },
        in_place ? target : rounded_out, value_width);
    if (in_place) return;
    for (int64_t r = 0; r < count; ++r, target += call.value_width) {
      std::copy_n(rounded_out + r * value_width, call.value_width, target);
    }
  }
};

}  // namespace
}  // namespace driftar::cpu
