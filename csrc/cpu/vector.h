#pragma once

// Row primitives of the kernels on ATen's portable vectors. Only for files compiled per instruction
// set. Rows are padded to a multiple of the vector width, so that no loop has a tail.

#include "padding.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace driftar::cpu {
namespace {

template <typename T>
using Vector = at::vec::Vectorized<T>;

// `count` rounded up to whole vectors of the instruction set at hand.
template <typename T>
constexpr int64_t whole_vectors(int64_t count) {
  return (count + Vector<T>::size() - 1) / Vector<T>::size() * Vector<T>::size();
}

template <typename T>
T sum_of(const Vector<T>& vector) {
  return at::vec::vec_reduce_all<T>([](Vector<T> a, Vector<T> b) { return a + b; }, vector);
}

// Lane-wise maximum of a row; NaN wins.
template <typename T>
Vector<T> row_maxima(const T* row, int64_t count) {
  using V = Vector<T>;
  constexpr int64_t lanes = V::size();
  V best[4];  // independent, since each maximum waits for the one before
  for (V& x : best) x = V(-std::numeric_limits<T>::infinity());
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    for (int64_t k = 0; k < 4; ++k) {
      best[k] = at::vec::maximum(best[k], V::loadu(row + i + k * lanes));
    }
  }
  for (; i < count; i += lanes) best[0] = at::vec::maximum(best[0], V::loadu(row + i));
  return at::vec::maximum(at::vec::maximum(best[0], best[1]), at::vec::maximum(best[2], best[3]));
}

// The largest lane; NaN wins.
template <typename T>
T maximum_of(const Vector<T>& vector) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const bool is_nan = _mm512_cmp_ps_mask(vector, vector, _CMP_UNORD_Q) != 0;
    return is_nan ? std::numeric_limits<T>::quiet_NaN() : _mm512_reduce_max_ps(vector);
  }
#endif
  alignas(64) T lanes[Vector<T>::size()];
  vector.store(lanes);
  T result = lanes[0];
  for (int lane = 1; lane < Vector<T>::size(); ++lane) {
    result = (result != result || result > lanes[lane]) ? result : lanes[lane];
  }
  return result;
}

template <typename T>
bool all_at_most(const Vector<T>& vector, T limit) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_cmp_ps_mask(vector, _mm512_set1_ps(limit), _CMP_NLE_UQ) == 0;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    return _mm256_movemask_ps(_mm256_cmp_ps(vector, _mm256_set1_ps(limit), _CMP_NLE_UQ)) == 0;
  }
#endif
  return maximum_of(vector) <= limit;
}

// 2^y of y < 128, and 0 where that is below the normal numbers; NaN stays. A polynomial in
// y - floor(y), whose own error is a fifth of a rounding and which is exact in 0. Inline, where
// ATen's exp is a function call for every vector.
inline Vector<float> power_of_two(Vector<float> y) {
  const float smallest = -126.0f;  // of the normal numbers
#if defined(CPU_CAPABILITY_AVX512)
  const Vector<float> r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  const Vector<float> whole = y.floor(), r = y - whole;
#endif
  Vector<float> p(0x1.c5462p-13f);  // minimax for the relative error
  for (const float c :
       {0x1.46d50cp-10f, 0x1.3d0ba8p-7f, 0x1.c68912p-5f, 0x1.ebfd58p-3f, 0x1.62e42cp-1f, 1.0f}) {
    p = at::vec::fmadd(p, r, Vector<float>(c));
  }
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 is_normal = _mm512_cmp_ps_mask(y, _mm512_set1_ps(smallest), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(is_normal, p, y);
#else
  // floor(y) in the low bits, from where it is added to the exponent.
  const auto shifted = at::vec::cast<int32_t>(whole + Vector<float>(0x1.8p23f));
  const auto exponent = shifted << Vector<int32_t>(23);
  const auto result = at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
  return Vector<float>::blendv(result, Vector<float>(0.0f), y < Vector<float>(smallest));
#endif
}

inline Vector<double> power_of_two(Vector<double> y) { return y.exp2(); }

template <typename T>
constexpr T kLog2E = T(1.4426950408889634074L);
template <typename T>
constexpr T kLog2 = T(0.69314718055994530942L);

// exp(x) of x < 88, otherwise like power_of_two.
inline Vector<float> exponential(Vector<float> x) {
  return power_of_two(x * Vector<float>(kLog2E<float>));
}

inline Vector<double> exponential(Vector<double> x) { return x.exp(); }

// row = exp(row - shift); adds exp(row - shift) to `totals` and exp(row - shift) (row - shift) to
// `moments`. -inf contributes 0 to all.
template <typename T>
void absorb_exponentials(T* row, int64_t count, T shift, Vector<T>& totals, Vector<T>& moments) {
  const Vector<T> offset(shift);
  const Vector<T> least(std::numeric_limits<T>::lowest());  // keeps 0 * -inf out of the moment
  Vector<T> total = totals, moment = moments;
  for (int64_t i = 0; i < count; i += Vector<T>::size()) {
    const Vector<T> exponent = Vector<T>::loadu(row + i) - offset;
    const Vector<T> e = exponential(exponent);
    total = total + e;
    moment = at::vec::fmadd(e, at::vec::clamp_min(exponent, least), moment);
    e.store(row + i);
  }
  totals = total, moments = moment;
}

template <typename T>
T row_dot(const T* a, const T* b, int64_t count) {
  Vector<T> sum(T(0));
  for (int64_t i = 0; i < count; i += Vector<T>::size()) {
    sum = at::vec::fmadd(Vector<T>::loadu(a + i), Vector<T>::loadu(b + i), sum);
  }
  return sum_of(sum);
}

// In place; zeros give the logarithm of the smallest normal number.
template <typename T>
void row_logarithm(T* row, int64_t count) {
  const Vector<T> floor(std::numeric_limits<T>::min());
  for (int64_t i = 0; i < count; i += Vector<T>::size()) {
    at::vec::maximum(Vector<T>::loadu(row + i), floor).log().store(row + i);
  }
}

}  // namespace
}  // namespace driftar::cpu
