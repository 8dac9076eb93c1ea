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
  // Pairs of keys that are summed apart: enough that no sum waits for the one before.
  constexpr int64_t chains = std::max<int64_t>(8 / (2 * ROWS * VECTORS), 1);
  V sums[chains][ROWS][2 * VECTORS];
  for (auto& chain : sums) {
    for (auto& row : chain) {
      for (V& sum : row) sum = V(0.0f);
    }
  }
  const auto take = [&](int64_t j, V(&chain)[ROWS][2 * VECTORS]) {
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
        V* own = &chain[i][2 * c];
        own[0] = Element::multiply_add(weight, _mm512_castsi512_ps(low), own[0]);
        own[1] = Element::multiply_add(weight, _mm512_castsi512_ps(high), own[1]);
      }
    }
  };
  int64_t j = 0;
  for (; j + 2 * chains <= keys; j += 2 * chains) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < chains; ++k) take(j + 2 * k, sums[k]);
  }
  for (; j < keys; j += 2) take(j, sums[0]);
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < 2 * VECTORS; ++c) {
      if (c * lanes >= columns) continue;
      float* target = out + i * out_stride + c * lanes;
      V sum = V::loadu(target);
#pragma GCC unroll 4
      for (int64_t k = 0; k < chains; ++k) sum = sum + sums[k][i][c];
      sum.store(target);
    }
  }
}

// The same for all columns; `width` in whole vectors of sums.
template <int64_t ROWS, int64_t VECTORS>
void few_value_columns(int64_t keys, int64_t width, Rows<Bf16Pair> weights,
                       Rows<c10::BFloat16> values, float* out, int64_t out_stride) {
  constexpr int64_t lanes = Vector<c10::BFloat16>::size();
  int64_t c = 0;
  for (; c + (VECTORS - 1) * lanes < width; c += VECTORS * lanes) {
    few_value_block<ROWS, VECTORS>(keys, width - c, weights, {values.data + c, values.stride},
                                   out + c, out_stride);
  }
  if constexpr (VECTORS > 1) {
    if (c < width) {
      few_value_columns<ROWS, VECTORS / 2>(keys, width - c, weights,
                                           {values.data + c, values.stride}, out + c, out_stride);
    }
  }
}

// The same for a number of rows known at run time.
template <int64_t ROWS>
void few_values(int64_t rows, int64_t keys, int64_t width, Rows<Bf16Pair> weights,
                Rows<c10::BFloat16> values, float* out, int64_t out_stride) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) {
      few_values<ROWS - 1>(rows, keys, width, weights, values, out, out_stride);
      return;
    }
    constexpr int64_t most = ROWS <= 2 ? 4 : ROWS <= 4 ? 2 : 1;
    few_value_columns<ROWS, most>(keys, width, weights, values, out, out_stride);
  }
}

}  // namespace
}  // namespace driftar::cpu
