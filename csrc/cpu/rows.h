#pragma once

// Rows of numbers in memory: asked for, copied, rounded, searched for NaN. Only for files compiled
// per instruction set.

#include "padding.h"
#include "vector.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>

namespace driftar::cpu {
namespace {

template <typename T>
struct Rows {
  const T* data;
  int64_t stride;

  const T* at(int64_t r) const { return data + r * stride; }
  Rows from(int64_t r) const { return {at(r), stride}; }
};

// Asks for rows that will be read soon.
template <typename T>
void prefetch(Rows<T> rows, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < width; c += padding<T>) {
      __builtin_prefetch(rows.at(r) + c, /*rw=*/0, /*locality=*/2);
    }
  }
}

// A row, filled up with zeros to its padded width.
template <typename T>
void copy_row(const T* row, int64_t width, T* target) {
  std::copy_n(row, width, target);
  std::fill(target + width, target + padded<T>(width), T(0));
}

template <typename T>
bool all_finite(Rows<T> rows, int64_t count, int64_t width) {
  Vector<T> sum(T(0));  // of x 0, which is NaN unless x is finite
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < width; c += Vector<T>::size()) {
      sum = at::vec::fmadd(Vector<T>::loadu(rows.at(r) + c), Vector<T>(T(0)), sum);
    }
  }
  return sum_of(sum) == T(0);
}

// target = factor row, rounded
template <typename T, typename scalar_t>
void store_scaled(const T* row, int64_t width, T factor, scalar_t* target) {
  for (int64_t c = 0; c < width; ++c) target[c] = static_cast<scalar_t>(row[c] * factor);
}

#if defined(CPU_CAPABILITY_AVX512)

// GCC would call functions for so short rows.
inline void copy_row(const c10::BFloat16* row, int64_t width, c10::BFloat16* target) {
  constexpr int64_t lanes = padding<c10::BFloat16>;
  int64_t c = 0;
  for (; c + lanes <= width; c += lanes) {
    _mm512_storeu_si512(target + c, _mm512_loadu_si512(row + c));
  }
  if (c < width) {
    const __mmask32 present = 0xffffffffu >> (c + lanes - width);
    _mm512_storeu_si512(target + c, _mm512_maskz_loadu_epi16(present, row + c));
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

inline void store_scaled(const float* row, int64_t width, float factor, c10::BFloat16* target) {
  constexpr int64_t lanes = Vector<float>::size();
  const Vector<float> scale(factor);
  for (int64_t c = 0; c < width; c += 2 * lanes) {
    const auto low = Vector<float>::loadu(row + c) * scale;
    const auto high =
        c + lanes < width ? Vector<float>::loadu(row + c + lanes) * scale : Vector<float>(0);
    const __mmask32 present =
        width - c >= 2 * lanes ? ~__mmask32{0} : (__mmask32{1} << (width - c)) - 1;
#if defined(__AVX512BF16__)
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
    const __m512i rounded = at::vec::convert_from_float<c10::BFloat16>(low, high);
#endif
    _mm512_mask_storeu_epi16(target + c, present, rounded);
  }
}

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

#endif

}  // namespace
}  // namespace driftar::cpu
