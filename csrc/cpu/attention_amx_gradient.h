#pragma once

// The backward pass on AMX, except that of the head-averaged map. Scores and their gradients are
// transposed, as in the forward pass: a query is a lane. With x = unit s - shift and q = exp(x),
//
//   p = share q,   scale dS = q (pull <grad_out, v> + (constant - bend x))
//
// where pull = scale share, bend = scale weight and constant = bend cross - pull delta. Both are
// rounded once, as rows of 32 queries, the left operand of the sums over queries; pairs of such
// rows are the right operand of the sum over keys. Only for kernel files compiled with AMX.

#include "attention_amx.h"
#include "attention_columns.h"
#include "attention_gradient.h"

#include <cmath>

namespace driftar::cpu {
namespace {

// RowGradient of a group of queries, as the formula above wants it; nothing in lanes without one.
struct GroupGradient {
  static constexpr int64_t group = kGroup<float>;
  alignas(64) float shift[group], share[group], pull[group], bend[group], constant[group];
  uint32_t present;  // lanes

  GroupGradient(const AttentionBackward<c10::BFloat16>& call,
                const QueryBlock<c10::BFloat16>& block, const Strip& strip, bool counted)
      : present(~uint32_t{0} >> (group - strip.rows)) {
    for (int64_t lane = 0; lane < group; ++lane) {
      const RowGradient<float> row =
          row_gradient(call, block, strip.first + std::min(lane, strip.rows - 1), counted);
      shift[lane] = row.shift, share[lane] = row.share;
      pull[lane] = call.scale * row.share, bend[lane] = call.scale * row.weight;
      constant[lane] = bend[lane] * row.cross - pull[lane] * row.delta;
    }
  }
};

// What a group of queries leaves of a step of keys, rounded: rows of p and of scale dS, and pairs
// of rows of the latter.
struct RoundedGradient {
  static constexpr int64_t group = kGroup<float>;
  c10::BFloat16 *probabilities, *gradient;
  Bf16Pair* pairs;

  RoundedGradient from(int64_t key) const {
    return {probabilities + key * group, gradient + key * group, pairs + key / 2 * group};
  }

  // Zeros behind `keys` keys, up to the end of a tile.
  void fill(int64_t keys) const {
    const int64_t end = tiles(keys, kTileDepth) * kTileDepth;
    std::fill(probabilities + keys * group, probabilities + end * group, c10::BFloat16());
    std::fill(gradient + keys * group, gradient + end * group, c10::BFloat16());
    std::fill(pairs + (keys + 1) / 2 * group, pairs + end / 2 * group, Bf16Pair{});
  }
};

// scores and <grad_out, v> of `keys` keys of a group -> what is above.
template <int64_t VECTORS>
void differentiate_columns(const GroupGradient& of, float unit, const float* scores,
                           const float* products, int64_t keys, const RoundedGradient& target) {
  constexpr int64_t group = kGroup<float>, lanes = Vector<float>::size();
  __m512 shift[VECTORS], share[VECTORS], pull[VECTORS], bend[VECTORS], constant[VECTORS];
  for (int64_t v = 0; v < VECTORS; ++v) {
    shift[v] = _mm512_load_ps(of.shift + v * lanes),
    share[v] = _mm512_load_ps(of.share + v * lanes);
    pull[v] = _mm512_load_ps(of.pull + v * lanes), bend[v] = _mm512_load_ps(of.bend + v * lanes);
    constant[v] = _mm512_load_ps(of.constant + v * lanes);
  }
  const __m512 units = _mm512_set1_ps(unit), bits = _mm512_set1_ps(kLog2E<float>);
  // Both of key j, rounded.
  const auto take = [&](int64_t j, __m512i& probability, __m512i& gradient) {
    __m512 p[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, change[2] = {p[0], p[0]};
#pragma GCC unroll 2
    for (int64_t v = 0; v < VECTORS; ++v) {
      const int64_t at = j * group + v * lanes;
      const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + at), units, shift[v]);
      const __m512 q = power_of_two(_mm512_mul_ps(x, bits));
      // Selected, since the value of a hidden key may be anything.
      const __mmask16 seen = _mm512_mask_cmp_ps_mask(
          static_cast<__mmask16>(of.present >> v * lanes), q, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const __m512 slope = _mm512_fmadd_ps(pull[v], _mm512_load_ps(products + at),
                                           _mm512_fnmadd_ps(bend[v], x, constant[v]));
      p[v] = _mm512_maskz_mul_ps(seen, share[v], q);
      change[v] = _mm512_maskz_mul_ps(seen, q, slope);
    }
    probability = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]);
    gradient = (__m512i)_mm512_cvtne2ps_pbh(change[1], change[0]);
  };
  for (int64_t j = 0; j < keys; j += 2) {
    __m512i probability, even, odd = _mm512_setzero_si512(), low, high;
    take(j, probability, even);
    _mm512_store_si512(target.probabilities + j * group, probability);
    _mm512_store_si512(target.gradient + j * group, even);
    if (j + 1 < keys) {
      take(j + 1, probability, odd);
      _mm512_store_si512(target.probabilities + (j + 1) * group, probability);
      _mm512_store_si512(target.gradient + (j + 1) * group, odd);
    }
    interleave(even, odd, low, high);
    _mm512_store_si512(target.pairs + j / 2 * group, low);
    _mm512_store_si512(target.pairs + j / 2 * group + lanes, high);
  }
}

// Rounded rows of a group as they are.
inline void widen_group(const c10::BFloat16* rows, int64_t keys, float* target) {
  for (int64_t i = 0; i < keys * kGroup<float>; ++i) target[i] = static_cast<float>(rows[i]);
}

// A block of queries, or of the gradients of out, as the right operand of products of features and
// of sums over queries.
struct PackedQueries {
  Rows<c10::BFloat16> rows;
  int64_t width;  // padded
  Bf16Pair *transposed, *interleaved;

  static int64_t size(int64_t rows, int64_t width) { return whole_groups<float>(rows) * width; }

  PackedQueries(int64_t padded_width, int64_t most_rows, Scratch<float>& scratch)
      : rows{},
        width(padded_width),
        transposed(scratch.take_as<Bf16Pair>(size(most_rows, width) / 2)),
        interleaved(scratch.take_as<Bf16Pair>(size(most_rows, width) / 2)) {}

  void pack(Rows<c10::BFloat16> source, int64_t count) {
    rows = source;
    pack_transposed(as_pairs(rows), count, width / 2, transposed);
    pack_interleaved(rows, count, width, interleaved);
    std::fill(interleaved + (count + 1) / 2 * width,
              interleaved + whole_groups<float>(count) / 2 * width, Bf16Pair{});
  }

  Tiles of_group(int64_t first) const { return group_tiles(transposed + first * width / 2); }
  Tiles from_group(int64_t first) const {
    return right_tiles(in_place(interleaved + first / 2 * width, width));
  }
};

// The keys or values of a tile as left operands, and their gradients.
struct KeyOperand {
  int64_t width;  // padded
  c10::BFloat16 *buffer, *packed;
  float* gradient;  // [keys, width]
  Rows<c10::BFloat16> rows{};
  Tiles transposed{nullptr, 0, 0, 0};  // of operands that are summed over keys
  bool finite = true;                  // of them

  KeyOperand(int64_t padded_width, int64_t keys, bool sums_over_keys, Scratch<float>& scratch)
      : width(padded_width),
        buffer(scratch.take_as<c10::BFloat16>(keys * width)),
        packed(sums_over_keys ? scratch.take_as<c10::BFloat16>(keys * width) : nullptr),
        gradient(scratch.take(keys * width)) {}

  // Whole tiles of A can be read from `rows`.
  void load(const Operand<const c10::BFloat16>& x, int64_t b, int64_t head, const Tile& tile,
            int64_t features) {
    rows = tile.columns % kTileRows == 0
               ? load_rows(x, b, head, tile.column, tile.columns, features, buffer)
               : copy_rows(x, b, head, tile.column, tile.columns, features, buffer);
    if (packed != nullptr) {
      transposed = pack_transposed_tiles(rows, tile.columns, width, packed);
      finite = all_finite(rows, tile.columns, width);
    }
    std::fill_n(gradient, tile.columns * width, 0.0f);
  }
};

// gradient[keys, width] += sum over the queries of a block of what they left, rounded: `rounded`
// [groups, key_block, group], of which group g holds the first seen[g] keys.
template <typename Between>
void gather_queries(const c10::BFloat16* rounded, int64_t key_block, const int64_t* seen,
                    int64_t queries, const PackedQueries& operand, bool partial, float* gradient,
                    float* memory, const Between& between) {
  constexpr int64_t group = kGroup<float>;
  const int64_t groups = tiles(queries, group);
  if (partial && !all_finite(operand.rows, queries, operand.width)) {
    for (int64_t g = 0; g < groups; ++g) {
      widen_group(rounded + g * key_block * group, seen[g], memory);
      accumulate_seen(seen[g], operand.width, std::min(group, queries - g * group),
                      Strided<float>{memory, group, 1}, operand.rows.from(g * group), gradient,
                      operand.width);
    }
    return;
  }
  // Later queries see no fewer keys.
  int64_t first = 0;
  for (int64_t key = 0; key < seen[groups - 1]; key += kTileDepth) {
    while (seen[first] <= key) ++first;
    const c10::BFloat16* left = rounded + (first * key_block + key) * group;
    multiply_tiles(kTileDepth / kTileRows, tiles(operand.width, kTileColumns), groups - first,
                   Tiles(left, kTileBytes, key_block * kTileBytes, kTileRows * kTileBytes),
                   operand.from_group(first * group), /*add=*/true, gradient + key * operand.width,
                   operand.width, between);
  }
}

// A task of AttentionKernel::backward. The gradients of queries gather transposed, [heads, groups,
// padded D, group].
inline void backward_tiles(const AttentionBackward<c10::BFloat16>& call, int64_t task,
                           float* grad_queries, float* memory) {
  using scalar_t = c10::BFloat16;
  constexpr int64_t group = kGroup<float>, lanes = Vector<float>::size();
  const int64_t width = padded<scalar_t>(call.width);
  const int64_t value_width = padded<scalar_t>(call.value_width);
  const BackwardBlocks size(call, /*tiles=*/true);
  const BackwardTask<scalar_t> own(call, task, size.keys);
  const int64_t b = own.b;
  const int64_t step = std::min(kTileStepKeys, size.keys);
  const int64_t padded_queries = whole_groups<float>(call.query_length);
  const float unit = score_unit(call);

  TileRegisters registers;
  Scratch<float> scratch{memory};
  KeyOperand keys(width, size.keys, /*sums_over_keys=*/true, scratch);
  KeyOperand values(value_width, size.keys, /*sums_over_keys=*/false, scratch);
  PackedQueries queries(width, size.queries, scratch);
  PackedQueries grad_out(value_width, size.queries, scratch);
  auto* query_buffer = scratch.take_as<scalar_t>(size.queries * width);
  auto* grad_out_buffer = scratch.take_as<scalar_t>(size.queries * value_width);
  auto* probabilities = scratch.take_as<scalar_t>(size.tile());
  auto* gradient = scratch.take_as<scalar_t>(size.tile());
  auto* pairs = scratch.take_as<Bf16Pair>(size.keys / 2 * group);
  float* scores = scratch.take(step * group);
  float* products = scratch.take(step * group);
  float* wide = scratch.take(size.keys * group);
  float* bias = scratch.next;

  const auto block_of = [&](int64_t k, int64_t row) {
    const int64_t rows = std::min(size.queries, call.query_length - row);
    return QueryBlock<scalar_t>{call, b, own.head + k, 1, row, rows};
  };

  Upcoming upcoming;
  const auto between = [&] { upcoming.ask(); };
  // What follows the block of head k.
  const auto expect_next = [&](int64_t k, int64_t row, const Tile& tile, const NextKeys& next) {
    upcoming.clear();
    row += size.queries;
    if (row < call.query_length) return expect_queries(call, block_of(k, row), upcoming);
    if (k + 1 < own.heads) return expect_queries(call, block_of(k + 1, 0), upcoming);
    expect_key_gradients(call, b, own.key_head, tile, upcoming);
    expect_keys(call, next.b, next.key_head, next.tile, upcoming);
    const int64_t head = next.key_head * own.heads;
    const QueryBlock<scalar_t> first{call, next.b, head,
                                     1,    0,      std::min(size.queries, call.query_length)};
    if (next.tile.columns > 0) expect_queries(call, first, upcoming);
  };

  const auto differentiate = [&](const QueryBlock<scalar_t>& block, const Tile& tile, bool counted,
                                 float* grad_query) {
    // Calls of between(): for every group of queries; for the keys, twice.
    const int64_t high = tiles(tile.columns, 2 * kTileRows);
    upcoming.divide(tiles(block.rows, group) * (2 * high + tiles(width, 2 * kTileRows)) +
                    high * tiles(width + value_width, 2 * kTileColumns));
    const bool partial = is_partial(block, tile);
    queries.pack(block.load(call.query, call.width, query_buffer), block.rows);
    grad_out.pack(block.load(call.grad_out, call.value_width, grad_out_buffer), block.rows);
    int64_t seen[kTileQueryBlock / group] = {};
    for_each_strip(block, tile, group, [&](const Strip& strip) {
      const int64_t g = strip.first / group, columns = tiles(strip.rows, kTileColumns);
      const RoundedGradient rounded{probabilities + g * size.keys * group,
                                    gradient + g * size.keys * group, pairs};
      const GroupGradient of(call, block, strip, counted);
      for (int64_t key = 0; key < strip.columns; key += step) {
        const Tile part{tile.column + key, std::min(step, strip.columns - key)};
        const int64_t rows = tiles(part.columns, kTileRows);
        multiply_tiles(rows, columns, width / kTileDepth, left_tiles(keys.rows.from(key)),
                       queries.of_group(strip.first), /*add=*/false, scores, group, between);
        multiply_tiles(rows, columns, value_width / kTileDepth, left_tiles(values.rows.from(key)),
                       grad_out.of_group(strip.first), /*add=*/false, products, group, between);
        if (unit != call.scale) scale_columns(call.scale, part.columns, scores);
        hide_columns(block, part, strip.part(key, part.columns, call.visibility.mask != nullptr),
                     scores, bias, nullptr);
        (strip.rows <= lanes ? differentiate_columns<1>
                             : differentiate_columns<2>)(of, unit, scores, products, part.columns,
                                                         rounded.from(key));
      }
      rounded.fill(strip.columns);
      seen[g] = strip.columns;
      float* sums = grad_query + strip.first * width;
      if (partial && !keys.finite) {
        widen_group(rounded.gradient, strip.columns, wide);
        accumulate_seen_columns(strip.columns, call.width, wide, keys.rows, sums);
      } else {
        multiply_tiles(tiles(call.width, kTileRows), columns, tiles(strip.columns, kTileDepth),
                       keys.transposed, group_tiles(pairs), /*add=*/true, sums, group, between);
      }
    });
    gather_queries(gradient, size.keys, seen, block.rows, queries, partial, keys.gradient, wide,
                   between);
    gather_queries(probabilities, size.keys, seen, block.rows, grad_out, partial, values.gradient,
                   wide, between);
  };

  own.for_each_tile([&](const CountedTile& tile, const NextKeys& next) {
    keys.load(call.key, b, own.key_head, tile, call.width);
    values.load(call.value, b, own.key_head, tile, call.value_width);
    for (int64_t k = 0; k < own.heads; ++k) {
      for (int64_t row = 0; row < call.query_length; row += size.queries) {
        const QueryBlock<scalar_t> block = block_of(k, row);
        if (visible_end(call, b, row + block.rows - 1) <= tile.column) continue;
        expect_next(k, row, tile, next);
        differentiate(block, tile, tile.counted, grad_queries + (k * padded_queries + row) * width);
      }
    }
    const int64_t first = (b * call.key_heads + own.key_head) * call.key_length + tile.column;
    store_rows(keys.gradient, width, tile.columns, call.width, call.grad_key + first * call.width);
    store_rows(values.gradient, value_width, tile.columns, call.value_width,
               call.grad_value + first * call.value_width);
  });
}

// Writes transposed gradients of the queries of `heads` heads.
inline void store_transposed_queries(const AttentionBackward<c10::BFloat16>& call, int64_t heads,
                                     const float* gradients, c10::BFloat16* target) {
  constexpr int64_t group = kGroup<float>;
  const int64_t width = padded<c10::BFloat16>(call.width);
  std::vector<c10::BFloat16> rows(group * width);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t row = 0; row < call.query_length; row += group, gradients += group * width) {
      const int64_t count = std::min(group, call.query_length - row);
      store_transposed(
          call.width, count,
          [&](int64_t c, int64_t lane) { return _mm512_loadu_ps(gradients + c * group + lane); },
          rows.data(), width);
      for (int64_t r = 0; r < count; ++r, target += call.width) {
        std::copy_n(rows.data() + r * width, call.width, target);
      }
    }
  }
}

}  // namespace
}  // namespace driftar::cpu
