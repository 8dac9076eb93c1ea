#pragma once

// Matrix products of the drifting field: right factors are packed panels of kPanelWidth columns.
// Only for files compiled per instruction set.

#include "drift.h"
#include "gemm.h"

namespace driftar::cpu {
namespace {

// Depth of one sum: a panel of that depth stays in the first cache, and long sums are made of
// short ones, which rounds less.
constexpr int64_t kDepth = 256;

// out[rows, width] (+)= factor left right, for one panel [depth, width] and depth <= kDepth.
template <typename T>
void multiply_panel(int64_t rows, int64_t depth, Strided<T> left, const T* right, bool add, T* out,
                    int64_t stride, T factor = T(1)) {
  multiply(rows, kPanelWidth<T>, depth, factor, left, in_place(right, kPanelWidth<T>),
           add ? T(1) : T(0), out, stride);
}

// out[rows, width] = coefficients[rows, M] stripe[M, width]
template <typename T>
void weighted_sums(int64_t rows, int64_t points, const T* coefficients, int64_t stride,
                   const T* stripe, T* out) {
  const Strided<T> left{coefficients, stride, 1};
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
      const Strided<T> left{by_point + first / width * panel_stride + first % width, 1, width};
      multiply_panel(count, depth, left, right, add, out + done * stride + panel * width, stride);
      done += count;
    }
  }
}

}  // namespace
}  // namespace driftar::cpu
