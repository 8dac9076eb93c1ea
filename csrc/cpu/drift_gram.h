#pragma once

// Squared forces without the forces: with the inner products G of the centred points,
// |sum_j c_j y_j|^2 = c^T G c. That saves work where points have many more features than there are
// points. Only for files compiled per instruction set.

#include "drift_points.h"
#include "drift_product.h"

namespace driftar::cpu {
namespace {

// Below this share of sum_j c_j^2 |y_j|^2, what uncorrelated points would give, too much of the
// quadratic form has cancelled.
constexpr double kSettledShare = 0.25;

// Whether G, made for them alone, and T quadratic forms of N rows cost clearly less than T products
// of N x M coefficients with the points.
inline bool gram_pays(int64_t rows, int64_t points, int64_t features, int64_t temperatures) {
  const int64_t sums = temperatures * rows;
  return points <= kGramPoints && 20 * sums * features > points * (18 * features + 13 * sums);
}

// gram[stripes, M padded, width] (+)= inner products over `depth` <= kDepth features of points
// packed panel_stride apart; upper triangle of panels.
template <typename T>
void add_gram(const T* by_point, int64_t panel_stride, int64_t depth, int64_t points, bool add,
              T* gram) {
  constexpr int64_t width = kPanelWidth<T>;
  const int64_t size = panel_padded<T>(points);
  for (int64_t panel = 0; panel < panels_of<T>(points); ++panel) {
    for (int64_t other = 0; other <= panel; ++other) {
      multiply_panel(width, depth, Strided<T>{by_point + other * panel_stride, 1, width},
                     by_point + panel * panel_stride, add,
                     gram + (panel * size + other * width) * width, width);
    }
  }
}

// The first rows of the Gram matrix as rows of values.
template <typename T>
void gram_rows(const T* gram, int64_t rows, int64_t points, T* values, int64_t stride) {
  constexpr int64_t width = kPanelWidth<T>;
  const int64_t size = panel_padded<T>(points);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t first = 0; first < points; first += width)
      std::copy_n(gram + first * size + r * width, width, values + r * stride + first);
  }
}

// Fills in the lower triangle of the first `rows` rows.
template <typename T>
void mirror_gram(int64_t rows, int64_t points, T* gram) {
  constexpr int64_t width = kPanelWidth<T>;
  const int64_t size = panel_padded<T>(points);
  for (int64_t panel = 0; panel < panels_of<T>(points); ++panel) {
    for (int64_t other = panel + 1; other < panels_of<T>(rows); ++other) {
      transpose_panel(gram + (other * size + panel * width) * width,
                      gram + (panel * size + other * width) * width);
    }
  }
}

// sum_i c_i^T G c_i of coefficients [rows, M padded], or a negative number if that has lost too
// much to cancellation. Of G the upper triangle of panels counts, twice beyond the diagonal. `sums`
// holds [rows, width].
template <typename T>
double quadratic_form(const T* coefficients, int64_t rows, int64_t points, int64_t stride,
                      const T* gram, const T* squared_norms, T* sums) {
  using V = Vector<T>;
  constexpr int64_t width = kPanelWidth<T>;
  const int64_t size = panel_padded<T>(points);
  double form = 0, uncorrelated = 0;
  for (int64_t first = 0; first < points; first += width) {
    const Strided<T> left{coefficients, stride, 1};
    const T* panel = gram + first * size;
    for (int64_t start = 0; start < first; start += kDepth) {
      const int64_t depth = std::min(kDepth, first - start);
      multiply_panel(rows, depth, left.from(0, start), panel + start * width, start > 0, sums,
                     width, T(2));
    }
    multiply_panel(rows, width, left.from(0, first), panel + first * width, first > 0, sums, width);
    for (int64_t r = 0; r < rows; ++r) {
      V product(T(0)), square(T(0));
      for (int64_t j = 0; j < width; j += V::size()) {
        const V c = V::loadu(coefficients + r * stride + first + j);
        product = at::vec::fmadd(c, V::loadu(sums + r * width + j), product);
        square = at::vec::fmadd(c * c, V::loadu(squared_norms + first + j), square);
      }
      form += sum_of(product);
      uncorrelated += sum_of(square);
    }
  }
  return form >= kSettledShare * uncorrelated ? form : -1;
}

}  // namespace
}  // namespace driftar::cpu
