#pragma once

// Rows of attention as operands of products: in the accumulation type, or bf16 as it is, in pairs.
// Only for kernel files.

#include "attention_tile.h"
#if defined(__AVX512BF16__)
#include "bf16_pairs.h"
#endif

#include <algorithm>
#include <cstdint>

namespace driftar::cpu {
namespace {

// What products take of a dtype: how rows are kept, and the elements that multiply.
template <typename scalar_t>
struct Multiplied {
  using stored_t = accumulate_t<scalar_t>;
  using element_t = stored_t;
};
#if defined(__AVX512BF16__)
template <>
struct Multiplied<c10::BFloat16> {
  using stored_t = c10::BFloat16;
  using element_t = Bf16Pair;
};
#endif
template <typename scalar_t>
using stored_type = typename Multiplied<scalar_t>::stored_t;
template <typename scalar_t>
using element_type = typename Multiplied<scalar_t>::element_t;

template <typename stored_t>
auto left_operand(Rows<stored_t> rows) {
  if constexpr (sizeof(stored_t) == 2) {
    return as_pairs(rows);
  } else {
    return rows;
  }
}

// Rows as the transposed right operand of a product, times `factor` unless they are pairs.
// `packed` holds `count` rows, filled up to whole panels, of padded width.
template <typename stored_t, typename E>
Panels<E> transposed_operand(Rows<stored_t> rows, int64_t count, int64_t width,
                             accumulate_t<stored_t> factor, E* packed) {
  if constexpr (kPaired<E>) {
    return pack_transposed(as_pairs(rows), count, padded<stored_t>(width) / 2, packed);
  } else {
    return pack(Strided<E>{rows.data, 1, rows.stride}, width, count, factor, packed);
  }
}

// Elements from one row of transposed_operand() to the next.
template <typename stored_t, typename E>
int64_t transposed_depth(int64_t width) {
  return kPaired<E> ? padded<stored_t>(width) / 2 : width;
}

// Rows as the right operand of sums over them.
template <typename stored_t, typename E>
struct RightOperand {
  Rows<stored_t> rows;
  Panels<E> panels;

  RightOperand from(int64_t r) const {
    return {rows.from(r),
            {panels.data + r / Elements<E>::numbers * panels.stride, panels.stride, panels.panel}};
  }
};

// In place, or in `packed`, which holds `count` rows, an even number, of padded width.
template <typename stored_t, typename E>
RightOperand<stored_t, E> right_operand(Rows<stored_t> rows, int64_t count, int64_t width,
                                        E* packed) {
  if constexpr (kPaired<E>) {
    return {rows, pack_interleaved(rows, count, padded<stored_t>(width), packed)};
  } else {
    return {rows, in_place(rows.data, rows.stride)};
  }
}

// Coefficients of sums over rows: as computed, and as they are multiplied.
template <typename T, typename E>
struct Coefficients {
  Strided<T> exact;
  Strided<E> multiplied;

  Coefficients from(int64_t i, int64_t p) const {
    return {exact.from(i, p), multiplied.from(i, p / Elements<E>::numbers)};
  }
};

// `exact` with its elements as they are multiplied: in place, or from `rounded`, of these steps.
template <typename T, typename E>
Coefficients<T, E> rounded_to(Strided<T> exact, const E* rounded, int64_t row, int64_t column) {
  if constexpr (kPaired<E>) {
    return {exact, {rounded, row, column}};
  } else {
    return {exact, exact};
  }
}

// target[m, n] += coefficients[m, k] rows[k, n] for coefficients that are 0 where a row is hidden,
// whose NaN or inf they do not let through.
template <typename T, typename stored_t>
void accumulate_seen(int64_t m, int64_t n, int64_t k, Strided<T> coefficients, Rows<stored_t> rows,
                     T* target, int64_t stride) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const T coefficient = coefficients.data[i * coefficients.row + j * coefficients.column];
      if (coefficient == T(0)) continue;
      const stored_t* row = rows.at(j);
      for (int64_t c = 0; c < n; ++c) {
        target[i * stride + c] += coefficient * static_cast<T>(row[c]);
      }
    }
  }
}

// target[m, n] += coefficients[m, k] rows[k, n]. `guarded`: hidden rows may hold NaN or inf.
// between() as of multiply().
template <typename T, typename E, typename stored_t, typename Between = DoNothing>
void accumulate(int64_t m, int64_t n, int64_t k, const Coefficients<T, E>& coefficients,
                const RightOperand<stored_t, E>& right, bool guarded, T* target, int64_t stride,
                const Between& between = {}) {
  if (guarded) {
    accumulate_seen(m, n, k, coefficients.exact, right.rows, target, stride);
  } else {
    multiply(m, n, elements<E>(k), T(1), coefficients.multiplied, right.panels, T(1), target,
             stride, between);
  }
}

}  // namespace
}  // namespace driftar::cpu
