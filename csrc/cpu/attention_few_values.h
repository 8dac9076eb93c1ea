#pragma once

// Sums of values weighted by few queries, with bf16 values as they lie: packing them, as matrix
// products want them, costs as much as so few rows save. Only for kernel files compiled with
// AVX512-BF16.

#include "bf16_pairs.h"

#include <algorithm>
#include <cstdint>

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

}  // namespace
}  // namespace driftar::cpu
