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

// D of one generated sample, the point `self`, from its distances.
template <typename T>
void scale_row(const T* distances, int64_t points, T scale, int64_t self, T* scaled) {
  const T factor = T(1) / std::max(scale, T(kMinScale));
  for (int64_t j = 0; j < points; ++j) scaled[j] = distances[j] * factor;
  std::fill(scaled + points, scaled + row_length<T>(points), std::numeric_limits<T>::infinity());
  scaled[self] += T(kSelfDistance);
}

// D of the generated samples [row, row + rows) from their distances, and its minima.
template <typename T>
void scale_distances(const T* distances, int64_t source_stride, int64_t row, int64_t rows,
                     int64_t points, T scale, T* scaled, Minima<T>& minima) {
  using V = Vector<T>;
  constexpr T kInfinite = std::numeric_limits<T>::infinity();
  const int64_t stride = row_length<T>(points);
  minima.lowest = kInfinite, minima.highest = -kInfinite;
  std::fill_n(minima.column, stride, kInfinite);
  for (int64_t r = 0; r < rows; ++r) {
    T* x = scaled + r * stride;
    scale_row(distances + r * source_stride, points, scale, row + r, x);
    V least(kInfinite);
    for (int64_t j = 0; j < stride; j += V::size()) {
      const V value = V::loadu(x + j);
      least = at::vec::minimum(least, value);
      at::vec::minimum(V::loadu(minima.column + j), value).store(minima.column + j);
    }
    minima.row[r] = -maximum_of(V(T(0)) - least);
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

// Half the log-sum-exps of padded totals, in place.
template <typename T>
void half_lses(T* totals, int64_t count, T shift, T inverse) {
  using V = Vector<T>;
  row_logarithm(totals, count);
  for (int64_t i = 0; i < count; i += V::size()) {
    (V(T(0.5)) * (V::loadu(totals + i) - V(shift * inverse))).store(totals + i);
  }
}

// What one temperature of a problem needs besides D to have its coefficients again:
//   c_ij = max(exp(-D_ij / R - row_half_i - column_half_j), 1e-3) (repel_i w_pos_j - attract_i
//   w_neg_j)
template <typename T>
struct Balance {
  int64_t generated, points;
  T *row_half, *repel, *attract;  // [N padded]
  T* column_half;                 // [M padded]

  Balance(int64_t generated, int64_t points, T* memory) : generated(generated), points(points) {
    const int64_t padded_rows = panel_padded<T>(generated);
    row_half = memory;
    repel = row_half + padded_rows;
    attract = repel + padded_rows;
    column_half = attract + padded_rows;
  }

  static int64_t size(int64_t generated, int64_t points) {
    return 3 * panel_padded<T>(generated) + row_length<T>(points);
  }

  // To and from [3 N + M].
  void save(T* target) const {
    for (const T* rows : {row_half, repel, attract}) target = std::copy_n(rows, generated, target);
    std::copy_n(column_half, points, target);
  }
  void load(const T* source) const {
    for (T* rows : {row_half, repel, attract}) {
      std::copy_n(source, generated, rows);
      source += generated;
    }
    std::fill(std::copy_n(source, points, column_half), column_half + row_length<T>(points), T(0));
  }
};

// Affinities before weighting of a whole problem [rows, M padded], and the balance's halves. Where
// one shift serves all rows and columns, one exponential serves both softmaxes:
//   a_ij^2 = (e_ij / sum_j e_ij) (e_ij / sum_i e_ij)
// Calls visit(r, row) for every row, while it is in the cache.
template <typename T, typename Visitor>
void whole_affinities(const T* scaled, int64_t rows, int64_t points, const Minima<T>& minima,
                      T inverse, const Balance<T>& balance, T* scratch, T* out, Visitor&& visit) {
  using V = Vector<T>;
  const int64_t stride = row_length<T>(points), padded_rows = panel_padded<T>(rows);
  T* columns = balance.column_half;
  std::fill(balance.row_half + rows, balance.row_half + padded_rows, T(1));
  if (!minima.shared(inverse)) {
    softmax_sums(scaled, rows, stride, minima, inverse, balance.row_half, scratch, columns);
    for (int64_t j = 0; j < points; ++j) columns[j] = half_lse(columns[j], scratch[j], inverse);
    std::fill(columns + points, columns + stride, T(0));
    for (int64_t r = 0; r < rows; ++r) {
      affinity_row(scaled + r * stride, stride, inverse, balance.row_half[r], columns, out);
      visit(r, out);
    }
    return;
  }
  std::fill_n(columns, stride, T(0));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * stride;
    balance.row_half[r] =
        exponential_sum(scaled + row, stride, minima.lowest, inverse, columns, out + row);
  }
  const V one(T(1)), floor{T(kMinAffinity)}, tiny(std::numeric_limits<T>::min());
  for (int64_t j = 0; j < stride; j += V::size()) {  // sums are 0 only in the padding
    (one / at::vec::maximum(V::loadu(columns + j), tiny).sqrt()).store(scratch + j);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const V own(T(1) / std::sqrt(balance.row_half[r]));
    T* row = out + r * stride;
    for (int64_t j = 0; j < stride; j += V::size()) {
      const V affinity = V::loadu(row + j) * own * V::loadu(scratch + j);
      at::vec::maximum(affinity, floor).store(row + j);
    }
    visit(r, row);
  }
  half_lses(balance.row_half, padded_rows, minima.lowest, inverse);
  half_lses(columns, stride, minima.lowest, inverse);
}

// Coefficients of the points in F_i = A-_i sum_pos a_ij y_j - A+_i sum_neg a_ij y_j, times
// `factor`, from affinities before weighting. The weights are split: w_neg is 0 at positives, w_pos
// elsewhere. Returns A-, A+.
template <typename T>
std::pair<T, T> coefficient_row(const T* affinity, int64_t stride, const T* w_neg, const T* w_pos,
                                T factor, T* out) {
  using V = Vector<T>;
  V repel(T(0)), attract(T(0));
  for (int64_t j = 0; j < stride; j += V::size()) {
    const V a = V::loadu(affinity + j);
    repel = at::vec::fmadd(a, V::loadu(w_neg + j), repel);
    attract = at::vec::fmadd(a, V::loadu(w_pos + j), attract);
  }
  const std::pair result{sum_of(repel), sum_of(attract)};
  const V to_pos(factor * result.first), to_neg(-factor * result.second);
  for (int64_t j = 0; j < stride; j += V::size()) {
    const V weight = at::vec::fmadd(to_pos, V::loadu(w_pos + j), to_neg * V::loadu(w_neg + j));
    (V::loadu(affinity + j) * weight).store(out + j);
  }
  return result;
}

// Adds the coefficients of row r again, times `factor`, from D and the temperature's balance.
template <typename T>
void add_balanced_row(const T* scaled, int64_t stride, T inverse, const Balance<T>& balance,
                      int64_t r, const T* w_neg, const T* w_pos, T factor, T* out) {
  using V = Vector<T>;
  const V rate(-inverse), own(-balance.row_half[r]), floor{T(kMinAffinity)};
  const V to_pos(factor * balance.repel[r]), to_neg(-factor * balance.attract[r]);
  for (int64_t j = 0; j < stride; j += 2 * V::size()) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v) {
      const int64_t at = j + v * V::size();
      const V argument =
          at::vec::fmadd(rate, V::loadu(scaled + at), own) - V::loadu(balance.column_half + at);
      const V affinity = at::vec::maximum(exponential(argument), floor);
      const V weight = at::vec::fmadd(to_pos, V::loadu(w_pos + at), to_neg * V::loadu(w_neg + at));
      at::vec::fmadd(affinity, weight, V::loadu(out + at)).store(out + at);
    }
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
