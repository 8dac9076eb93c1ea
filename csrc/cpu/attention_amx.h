#pragma once

// Operands of attention as AMX multiplies them. A group of queries is two tiles wide: the scores of
// a key, transposed, are a row of such a pair. Only for kernel files compiled with AMX.

#include "amx.h"
#include "attention_lanes.h"
#include "attention_operands.h"

#include <cmath>

namespace driftar::cpu {
namespace {

static_assert(kGroup<float> == 2 * kTileColumns);

// What the products of queries and keys are multiplied with where they are used. Otherwise 1, and
// scale_columns() goes over them first: maxima want a positive unit, additive masks one of 1.
inline float score_unit(const AttentionShape<c10::BFloat16>& shape) {
  const bool additive = shape.visibility.mask != nullptr && !shape.visibility.mask_is_bool;
  return shape.scale > 0 && std::isfinite(shape.scale) && !additive ? shape.scale : 1.0f;
}

inline void scale_columns(float scale, int64_t keys, float* scores) {
  for (int64_t i = 0; i < keys * kGroup<float>; i += Vector<float>::size()) {
    (Vector<float>::loadu(scores + i) * Vector<float>(scale)).store(scores + i);
  }
}

// Rows as tiles of A; `width` in whole depths of a tile.
inline Tiles left_tiles(Rows<c10::BFloat16> rows) {
  const int64_t row = rows.stride * sizeof(c10::BFloat16);
  return {rows.data, row, kTileBytes, kTileRows * row};
}

// Rows of pairs, kGroup of them wide, as tiles of B.
inline Tiles group_tiles(const Bf16Pair* pairs) {
  constexpr int64_t row = kGroup<float> * sizeof(Bf16Pair);
  return {pairs, row, kTileDepth / 2 * row, kTileBytes};
}

// Rows of pairs of any width as tiles of B.
inline Tiles right_tiles(Panels<Bf16Pair> pairs) {
  const int64_t row = pairs.stride * sizeof(Bf16Pair);
  return {pairs.data, row, kTileDepth / 2 * row, kTileBytes};
}

// Transposed rows as tiles of A, one after the other: tile (panel of kTileDepth rows, 16 features).
// `width` is padded; zeros fill the last panel.
inline Tiles pack_transposed_tiles(Rows<c10::BFloat16> rows, int64_t count, int64_t width,
                                   c10::BFloat16* packed) {
  constexpr int64_t lanes = Vector<c10::BFloat16>::size();
  const __m512i zero = _mm512_setzero_si512();
  c10::BFloat16* target = packed;
  for (int64_t first = 0; first < count; first += kTileDepth) {
    for (int64_t c = 0; c < width; c += lanes) {
      alignas(64) float pairs[2][kTileDepth / 2][kTileRows];  // [half of the features][pair]
      for (int64_t p = 0; p < kTileDepth; p += 2) {
        const int64_t r = first + p;
        const __m512i even = r < count ? _mm512_loadu_si512(rows.at(r) + c) : zero;
        const __m512i odd = r + 1 < count ? _mm512_loadu_si512(rows.at(r + 1) + c) : zero;
        __m512i low, high;
        interleave(even, odd, low, high);
        _mm512_store_si512(pairs[0][p / 2], low);
        _mm512_store_si512(pairs[1][p / 2], high);
      }
      for (const auto& half : pairs) {
        transpose_16x16([&](int64_t r) { return half[r]; }, [](__m512 column) { return column; },
                        reinterpret_cast<float*>(target), kTileDepth / 2);
        target += kTileSize;
      }
    }
  }
  return {packed, kTileBytes, width / kTileRows * kTileSize * int64_t{sizeof(c10::BFloat16)},
          kTileSize * int64_t{sizeof(c10::BFloat16)}};
}

// Zeros behind `count` keys of a group's weights, up to the end of a tile of B.
inline void fill_group(int64_t count, Bf16Pair* weights) {
  constexpr int64_t group = kGroup<float>;
  std::fill(weights + elements<Bf16Pair>(count) * group,
            weights + tiles(count, kTileDepth) * kTileDepth / 2 * group, Bf16Pair{});
}

// target[c, lane] += sum_j coefficients[j, lane] rows[j, c] for coefficients that are 0 where a row
// is hidden, whose NaN or inf they do not let through.
inline void accumulate_seen_columns(int64_t count, int64_t width, const float* coefficients,
                                    Rows<c10::BFloat16> rows, float* target) {
  constexpr int64_t group = kGroup<float>, lanes = Vector<float>::size();
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t lane = 0; lane < group; lane += lanes) {
      const __m512 own = _mm512_loadu_ps(coefficients + j * group + lane);
      const __mmask16 seen = _mm512_cmp_ps_mask(own, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      for (int64_t c = 0; c < width; ++c) {
        float* sum = target + c * group + lane;
        const __m512 feature = _mm512_set1_ps(static_cast<float>(rows.at(j)[c]));
        _mm512_storeu_ps(sum, _mm512_mask3_fmadd_ps(own, feature, _mm512_loadu_ps(sum), seen));
      }
    }
  }
}

// Rounds transposed sums [width, kGroup] to `count` rows of `width` features, kept `stride` apart
// with their padding, 32 at a time. finish(c, lane) is a vector of sums.
template <typename Finish>
void store_transposed(int64_t width, int64_t count, Finish&& finish, c10::BFloat16* target,
                      int64_t stride) {
  constexpr int64_t lanes = Vector<float>::size();
  for (int64_t c = 0; c < width; c += 2 * lanes) {
    for (int64_t lane = 0; lane < count; lane += lanes) {
      alignas(64) float pairs[lanes][lanes];  // [pair of features][query]
      for (int64_t p = 0; p < lanes; ++p) {
        _mm512_store_si512(pairs[p],
                           rounded_pairs(finish(c + 2 * p, lane), finish(c + 2 * p + 1, lane)));
      }
      transpose_16x16([&](int64_t r) { return pairs[r]; }, [](__m512 column) { return column; },
                      reinterpret_cast<float*>(target + lane * stride + c), stride / 2);
    }
  }
}

}  // namespace
}  // namespace driftar::cpu
