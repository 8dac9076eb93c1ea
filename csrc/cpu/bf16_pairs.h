#pragma once

// Products of bf16 matrices with fp32 sums on the vectors of AVX512-BF16, which multiply two
// neighbouring elements of the depth at once. Only for files compiled with it.

#include "gemm.h"
#include "rows.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cstdint>

namespace driftar::cpu {
namespace {

struct Bf16Pair {
  c10::BFloat16 even, odd;
};

template <>
struct Elements<Bf16Pair> {
  static constexpr int64_t numbers = 2;
  using sum_t = float;
  using vector_t = Vector<float>;  // of 16 pairs
  static vector_t load(const Bf16Pair* x) { return _mm512_loadu_ps(x); }
  static vector_t spread(Bf16Pair x) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(std::bit_cast<int32_t>(x)));
  }
  static vector_t multiply_add(vector_t a, vector_t b, vector_t sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)__m512(a), (__m512bh)__m512(b));
  }
};

// Rows of whole vectors as rows of pairs of neighbours.
inline Rows<Bf16Pair> as_pairs(Rows<c10::BFloat16> rows) {
  return {reinterpret_cast<const Bf16Pair*>(rows.data), rows.stride / 2};
}

// Rows, `pairs` long in whole vectors, as the transposed right operand of a product. What lies
// behind the last row, up to the next whole vector, is a copy of it.
inline Panels<Bf16Pair> pack_transposed(Rows<Bf16Pair> rows, int64_t count, int64_t pairs,
                                        Bf16Pair* packed) {
  constexpr int64_t width = kGemmColumns<Bf16Pair>, lanes = Vector<float>::size();
  const Panels<Bf16Pair> panels = packed_panels(packed, pairs);
  for (int64_t j = 0; j < count; j += lanes) {
    Bf16Pair* target = packed + j / width * panels.panel + j % width;
    const float* row[lanes];
    for (int64_t r = 0; r < lanes; ++r) {
      row[r] = reinterpret_cast<const float*>(rows.at(std::min(j + r, count - 1)));
    }
    for (int64_t p = 0; p < pairs; p += lanes, target += lanes * width) {
      transpose_16x16([&](int64_t r) { return row[r] + p; }, [](__m512 column) { return column; },
                      reinterpret_cast<float*>(target), width);
    }
  }
  return panels;
}

// Element c of two rows as pair c, for a vector of each row.
inline void interleave(__m512i even, __m512i odd, __m512i& low, __m512i& high) {
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i order = _mm512_load_si512(kLow);
  low = _mm512_permutex2var_epi16(even, order, odd);
  high = _mm512_permutex2var_epi16(even, _mm512_add_epi16(order, _mm512_set1_epi16(16)), odd);
}

// Lower half and upper half of a vector, interleaved.
inline __m512i interleave_halves(__m512i halves) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}

// Pairs of neighbouring rows, `width` long in whole vectors, as the rows of a right operand: row p
// holds rows 2 p and 2 p + 1, or zeros for one that is not there.
inline Panels<Bf16Pair> pack_interleaved(Rows<c10::BFloat16> rows, int64_t count, int64_t width,
                                         Bf16Pair* packed) {
  constexpr int64_t lanes = Vector<c10::BFloat16>::size();
  for (int64_t r = 0; r < count; r += 2) {
    Bf16Pair* target = packed + r / 2 * width;
    for (int64_t c = 0; c < width; c += lanes) {
      __m512i low, high;
      const __m512i even = _mm512_loadu_si512(rows.at(r) + c);
      const __m512i odd =
          r + 1 < count ? _mm512_loadu_si512(rows.at(r + 1) + c) : _mm512_setzero_si512();
      interleave(even, odd, low, high);
      _mm512_storeu_si512(target + c, low);
      _mm512_storeu_si512(target + c + lanes / 2, high);
    }
  }
  return in_place(packed, width);
}

// Rounds rows of whole fp32 vectors to rows of pairs of neighbours.
inline void narrow_rows(Rows<float> rows, int64_t count, int64_t columns, Bf16Pair* target) {
  for (int64_t r = 0; r < count; ++r) {
    narrow(rows.at(r), columns, reinterpret_cast<c10::BFloat16*>(target + r * rows.stride / 2));
  }
}

// Two rounded vectors, their elements paired.
inline __m512i rounded_pairs(__m512 even, __m512 odd) {
  return interleave_halves((__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Rounds rows of whole fp32 vectors and pairs neighbouring ones: row p of the target holds rows 2 p
// and 2 p + 1, or zeros for one that is not there.
inline void narrow_interleaved(Rows<float> rows, int64_t count, int64_t columns, Bf16Pair* target) {
  for (int64_t r = 0; r < count; r += 2) {
    Bf16Pair* pairs = target + r / 2 * rows.stride;
    for (int64_t c = 0; c < columns; c += Vector<float>::size()) {
      const __m512 even = _mm512_loadu_ps(rows.at(r) + c);
      const __m512 odd = r + 1 < count ? _mm512_loadu_ps(rows.at(r + 1) + c) : _mm512_setzero_ps();
      _mm512_storeu_si512(pairs + c, rounded_pairs(even, odd));
    }
  }
}

}  // namespace
}  // namespace driftar::cpu
