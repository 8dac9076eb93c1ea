#pragma once

// Rows of the drifting field's softmaxes. With the scaled distances D_ij, 100 added between a
// sample and itself, and 1 / R = inverse:
//
//   l_ij = -D_ij / R
//   a_ij = max(exp(l_ij - (lse_row_i + lse_col_j) / 2), 1e-3) w_j
//
// Rows are padded to whole panels; D is infinite there and weights are 0. Only for files compiled
// per instruction set.

#include "drift.h"
#include "vector.h"

#include <cmath>
#include <limits>

namespace driftar::cpu {
namespace {

constexpr double kMinScale = 1e-3;
constexpr double kMinAffinity = 1e-3;
constexpr double kSelfDistance = 100;
// Largest difference of two maxima of l that one shift serves: what vanishes below exp(-87) is less
// than exp(-27) of its own row.
constexpr double kSharedRange = 60;

// Smallest D of every row and column of a block, and overall extremes of these.
template <typename T>
struct Minima {
  T lowest, highest;
  T* row;
  T* column;

  // Whether exp((lowest - D) / R) loses nothing in any row or column.
  bool shared(T inverse) const { return (highest - lowest) * inverse <= T(kSharedRange); }
};

// D of the generated samples [row, row + rows) from their distances, and its minima.
template <typename T>
void scale_distances(const T* distances, int64_t source_stride, int64_t row, int64_t rows,
                     int64_t points, T scale, T* scaled, Minima<T>& minima) {
  using V = Vector<T>;
  constexpr T kInfinite = std::numeric_limits<T>::infinity();
  const int64_t stride = row_length<T>(points);
  const T factor = T(1) / std::max(scale, T(kMinScale));
  minima.lowest = kInfinite, minima.highest = -kInfinite;
  std::fill_n(minima.column, stride, kInfinite);
  for (int64_t r = 0; r < rows; ++r) {
    T* x = scaled + r * stride;
    const T* source = distances + r * source_stride;
    for (int64_t j = 0; j < points; ++j) x[j] = source[j] * factor;
    std::fill(x + points, x + stride, kInfinite);
    x[row + r] += T(kSelfDistance);
    V least(kInfinite);
    for (int64_t j = 0; j < stride; j += V::size()) {
      const V value = V::loadu(x + j);
      least = at::vec::minimum(least, value);
      at::vec::minimum(V::loadu(minima.column + j), value).store(minima.column + j);
    }
    alignas(64) T lanes[V::size()];
    least.store(lanes);
    minima.row[r] = *std::min_element(lanes, lanes + V::size());
  }
  std::fill(minima.column + points, minima.column + stride, T(0));
  for (const auto& [values, count] :
       {std::pair(minima.row, rows), std::pair(minima.column, points)}) {
    const auto [least, most] = std::minmax_element(values, values + count);
    minima.lowest = std::min(minima.lowest, *least);
    minima.highest = std::max(minima.highest, *most);
  }
}

// sum_j exp((shift - D_j) / R); the terms are added to `columns` and kept in `terms` unless null.
template <typename T>
T exponential_sum(const T* scaled, int64_t stride, T shift, T inverse, T* columns, T* terms) {
  using V = Vector<T>;
  const V offset(shift), rate(inverse);
  V sums[2] = {V(T(0)), V(T(0))};
  for (int64_t j = 0; j < stride; j += 2 * V::size()) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v) {
      const int64_t at = j + v * V::size();
      const V e = exponential((offset - V::loadu(scaled + at)) * rate);
      sums[v] = sums[v] + e;
      if (columns != nullptr) (V::loadu(columns + at) + e).store(columns + at);
      if (terms != nullptr) e.store(terms + at);
    }
  }
  return sum_of(sums[0] + sums[1]);
}

// columns_j += exp((shift_j - D_j) / R)
template <typename T>
void add_exponentials(const T* scaled, int64_t stride, const T* shifts, T inverse, T* columns) {
  using V = Vector<T>;
  for (int64_t j = 0; j < stride; j += V::size()) {
    const V e = exponential((V::loadu(shifts + j) - V::loadu(scaled + j)) * V(inverse));
    (V::loadu(columns + j) + e).store(columns + j);
  }
}

// Half the log-sum-exp of sum exp((shift - D) / R) = total.
template <typename T>
T half_lse(T total, T shift, T inverse) {
  return T(0.5) * (std::log(total) - shift * inverse);
}

// Sums over rows and columns of one temperature in a block: totals of rows about their own shift,
// and of columns. The shifts are one value where that loses nothing, else each one's own maximum.
template <typename T>
void softmax_sums(const T* scaled, int64_t rows, int64_t stride, const Minima<T>& minima, T inverse,
                  T* row_half, T* column_shifts, T* columns) {
  std::fill_n(columns, stride, T(0));
  const bool shared = minima.shared(inverse);
  if (shared) {
    std::fill_n(column_shifts, stride, minima.lowest);
  } else {
    std::copy_n(minima.column, stride, column_shifts);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = scaled + r * stride;
    const T shift = shared ? minima.lowest : minima.row[r];
    const T total = exponential_sum(row, stride, shift, inverse, shared ? columns : nullptr,
                                    static_cast<T*>(nullptr));
    row_half[r] = half_lse(total, shift, inverse);
    if (!shared) add_exponentials(row, stride, column_shifts, inverse, columns);
  }
}

// Sums of exponentials about shifts: total exp((shift - D) / R) takes up those about other shifts.
template <typename T>
void merge_shifted(T* shifts, T* totals, const T* other_shifts, const T* other_totals,
                   int64_t count, T inverse) {
  using V = Vector<T>;
  const V rate(inverse);
  for (int64_t j = 0; j < count; j += V::size()) {
    const V left = V::loadu(shifts + j), right = V::loadu(other_shifts + j);
    const V shift = at::vec::minimum(left, right);
    const V total = V::loadu(totals + j) * exponential((shift - left) * rate) +
                    V::loadu(other_totals + j) * exponential((shift - right) * rate);
    shift.store(shifts + j);
    total.store(totals + j);
  }
}

// Affinities before weighting, max(exp(-D_j / R - row_half - column_half_j), 1e-3).
template <typename T>
void affinity_row(const T* scaled, int64_t stride, T inverse, T row_half, const T* column_half,
                  T* out) {
  using V = Vector<T>;
  const V rate(-inverse), own(row_half), floor{T(kMinAffinity)};
  for (int64_t j = 0; j < stride; j += 2 * V::size()) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v) {
      const int64_t at = j + v * V::size();
      const V argument =
          at::vec::fmadd(rate, V::loadu(scaled + at), V(T(0)) - own) - V::loadu(column_half + at);
      at::vec::maximum(exponential(argument), floor).store(out + at);
    }
  }
}

// Affinities before weighting of a whole problem [rows, M padded]. Where one shift serves all rows
// and columns, one exponential serves both softmaxes: a_ij^2 = (e_ij / sum_j e_ij) (e_ij / sum_i
// e_ij).
// Calls visit(r, row) for every row, while it is in the cache.
template <typename T, typename Visitor>
void whole_affinities(const T* scaled, int64_t rows, int64_t points, const Minima<T>& minima,
                      T inverse, T* row_totals, T* shifts, T* columns, T* out, Visitor&& visit) {
  using V = Vector<T>;
  const int64_t stride = row_length<T>(points);
  if (!minima.shared(inverse)) {
    softmax_sums(scaled, rows, stride, minima, inverse, row_totals, shifts, columns);
    for (int64_t j = 0; j < points; ++j) columns[j] = half_lse(columns[j], shifts[j], inverse);
    std::fill(columns + points, columns + stride, T(0));
    for (int64_t r = 0; r < rows; ++r) {
      affinity_row(scaled + r * stride, stride, inverse, row_totals[r], columns, out);
      visit(r, out);
    }
    return;
  }
  std::fill_n(columns, stride, T(0));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * stride;
    row_totals[r] =
        exponential_sum(scaled + row, stride, minima.lowest, inverse, columns, out + row);
  }
  const V one(T(1)), floor{T(kMinAffinity)}, tiny(std::numeric_limits<T>::min());
  for (int64_t j = 0; j < stride; j += V::size()) {  // sums are 0 only in the padding
    (one / at::vec::maximum(V::loadu(columns + j), tiny).sqrt()).store(columns + j);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const V own(T(1) / std::sqrt(row_totals[r]));
    T* row = out + r * stride;
    for (int64_t j = 0; j < stride; j += V::size()) {
      const V affinity = V::loadu(row + j) * own * V::loadu(columns + j);
      at::vec::maximum(affinity, floor).store(row + j);
    }
    visit(r, row);
  }
}

// Coefficients of the points in F_i = A-_i sum_pos a_ij y_j - A+_i sum_neg a_ij y_j, times
// `factor`, from affinities before weighting. The weights are split: w_neg is 0 at positives, w_pos
// elsewhere.
template <typename T>
void coefficient_row(const T* affinity, int64_t stride, const T* w_neg, const T* w_pos, T factor,
                     bool add, T* out) {
  using V = Vector<T>;
  V repel(T(0)), attract(T(0));
  for (int64_t j = 0; j < stride; j += V::size()) {
    const V a = V::loadu(affinity + j);
    repel = at::vec::fmadd(a, V::loadu(w_neg + j), repel);
    attract = at::vec::fmadd(a, V::loadu(w_pos + j), attract);
  }
  const V to_pos(factor * sum_of(repel)), to_neg(-factor * sum_of(attract));
  for (int64_t j = 0; j < stride; j += V::size()) {
    const V weight = at::vec::fmadd(to_pos, V::loadu(w_pos + j), to_neg * V::loadu(w_neg + j));
    const V value = V::loadu(affinity + j) * weight;
    (add ? V::loadu(out + j) + value : value).store(out + j);
  }
}

// Weights [M] of a problem, padded and split for coefficient_row.
template <typename T>
void split_weights(const T* weight, int64_t negatives, int64_t points, T* w_neg, T* w_pos) {
  const int64_t stride = row_length<T>(points);
  std::fill(std::copy_n(weight, negatives, w_neg), w_neg + stride, T(0));
  std::fill_n(w_pos, stride, T(0));
  std::copy(weight + negatives, weight + points, w_pos + negatives);
}

template <typename T>
double sum_of_squares(const T* values, int64_t count) {
  using V = Vector<T>;
  V sums[2] = {V(T(0)), V(T(0))};
  for (int64_t i = 0; i < count; i += 2 * V::size()) {
    for (int64_t v = 0; v < 2; ++v) {
      const V x = V::loadu(values + i + v * V::size());
      sums[v] = at::vec::fmadd(x, x, sums[v]);
    }
  }
  return sum_of(sums[0] + sums[1]);
}

}  // namespace
}  // namespace driftar::cpu
