#pragma once

// Matrix products of the drifting field: right factors are packed panels of kPanelWidth columns.
// Only for files compiled per instruction set.

#include "drift.h"
#include "vector.h"

namespace driftar::cpu {
namespace {

// Register block: kTileRows x 2 vectors. Divides the panel width.
template <typename T>
constexpr int64_t kTileRows = sizeof(T) * Vector<T>::size() >= 64 ? 8 : 4;
// Depth of one sum: a panel of that depth stays in the first cache, and long sums are made of
// short ones, which rounds less.
constexpr int64_t kDepth = 256;

// Element (i, p) of a left factor is data[i * row + p * column].
template <typename T>
struct LeftFactor {
  const T* data;
  int64_t row, column;

  LeftFactor from(int64_t i, int64_t p) const { return {data + i * row + p * column, row, column}; }
};

// out[ROWS, 2 vectors] (+)= left right
template <int64_t ROWS, typename T>
inline void multiply_tile(int64_t depth, LeftFactor<T> left, const T* right, bool add, T* out,
                          int64_t stride) {
  using V = Vector<T>;
  V sums[ROWS][2];
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; ++i) sums[i][0] = sums[i][1] = V(T(0));
  for (int64_t p = 0; p < depth; ++p) {
    const V first = V::loadu(right + p * kPanelWidth<T>);
    const V second = V::loadu(right + p * kPanelWidth<T> + V::size());
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; ++i) {
      const V factor(left.data[i * left.row + p * left.column]);
      sums[i][0] = at::vec::fmadd(factor, first, sums[i][0]);
      sums[i][1] = at::vec::fmadd(factor, second, sums[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; ++i) {
    for (int64_t half = 0; half < 2; ++half) {
      T* target = out + i * stride + half * V::size();
      (add ? V::loadu(target) + sums[i][half] : sums[i][half]).store(target);
    }
  }
}

// multiply_tile for a number of rows known at run time.
template <int64_t ROWS, typename T>
inline void multiply_rows(int64_t rows, int64_t depth, LeftFactor<T> left, const T* right, bool add,
                          T* out, int64_t stride) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      multiply_tile<ROWS>(depth, left, right, add, out, stride);
    } else {
      multiply_rows<ROWS - 1>(rows, depth, left, right, add, out, stride);
    }
  }
}

// out[rows, width] (+)= left right, for one panel [depth, width] and depth <= kDepth.
template <typename T>
void multiply_panel(int64_t rows, int64_t depth, LeftFactor<T> left, const T* right, bool add,
                    T* out, int64_t stride) {
  for (int64_t column = 0; column < kPanelWidth<T>; column += 2 * Vector<T>::size()) {
    for (int64_t row = 0; row < rows; row += kTileRows<T>) {
      multiply_rows<kTileRows<T>>(std::min(kTileRows<T>, rows - row), depth, left.from(row, 0),
                                  right + column, add, out + row * stride + column, stride);
    }
  }
}

// out[rows, width] = coefficients[rows, M] stripe[M, width]
template <typename T>
void weighted_sums(int64_t rows, int64_t points, const T* coefficients, int64_t stride,
                   const T* stripe, T* out) {
  const LeftFactor<T> left{coefficients, stride, 1};
  for (int64_t start = 0; start < points; start += kDepth) {
    multiply_panel(rows, std::min(kDepth, points - start), left.from(0, start),
                   stripe + start * kPanelWidth<T>, start > 0, out, kPanelWidth<T>);
  }
}

// out[rows, M padded] (+)= inner products of the points [row, row + rows) with all points over
// `depth` <= kDepth features. Panels of by_point lie panel_stride apart.
template <typename T>
void inner_products(const T* by_point, int64_t panel_stride, int64_t depth, int64_t row,
                    int64_t rows, int64_t points, bool add, T* out, int64_t stride) {
  constexpr int64_t width = kPanelWidth<T>;
  for (int64_t panel = 0; panel < panels_of<T>(points); ++panel) {
    const T* right = by_point + panel * panel_stride;
    for (int64_t done = 0; done < rows;) {
      // Rows up to the end of their own panel.
      const int64_t first = row + done;
      const int64_t count = std::min(rows - done, width - first % width);
      const LeftFactor<T> left{by_point + first / width * panel_stride + first % width, 1, width};
      multiply_panel(count, depth, left, right, add, out + done * stride + panel * width, stride);
      done += count;
    }
  }
}

}  // namespace
}  // namespace driftar::cpu
