#pragma once

// Rows of bf16, as operands on AMX tiles and on vectors. Only for files compiled per instruction
// set.

#include "gemm.h"

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace driftar::cpu {
namespace {

// Rounds a row of whole fp32 vectors; zeros fill it up to whole vectors of bf16.
inline void narrow(const float* row, int64_t count, c10::BFloat16* target) {
  constexpr int64_t lanes = Vector<float>::size();
  for (int64_t j = 0; j < count; j += 2 * lanes) {
    const auto low = Vector<float>::loadu(row + j);
    const auto high = j + lanes < count ? Vector<float>::loadu(row + j + lanes) : Vector<float>(0);
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(target + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
    at::vec::convert_from_float<c10::BFloat16>(low, high).store(target + j);
#endif
  }
}

// Rows are read in whole vectors.
inline bool all_finite(Rows<c10::BFloat16> rows, int64_t count, int64_t width) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);  // all ones: NaN or inf
  __m512i largest = _mm512_setzero_si512();
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < width; c += Vector<c10::BFloat16>::size()) {
      const __m512i row = _mm512_loadu_si512(rows.at(r) + c);
      largest = _mm512_max_epu16(largest, _mm512_and_si512(row, exponent));
    }
  }
  return _mm512_cmpeq_epi16_mask(largest, exponent) == 0;
}

}  // namespace
}  // namespace driftar::cpu
