#pragma once

// Centring and packing the points of a drifting field, and the distances between them. Only for
// files compiled per instruction set.

#include "drift.h"
#include "gemm.h"

#include <cmath>

namespace driftar::cpu {
namespace {

constexpr double kMinDistance = 1e-4;
// Squared distances below this share of the squared norms lose too much to cancellation.
constexpr double kCloseShare = 0.1;

// Point j of problem b.
template <typename scalar_t>
std::pair<const scalar_t*, int64_t> point_at(const DriftPoints<scalar_t>& call, int64_t b,
                                             int64_t j) {
  const Samples<scalar_t>* part = call.parts;
  for (; j >= part->count; ++part) j -= part->count;
  return {part->data + b * part->batch + j * part->row, part->column};
}

// From the inputs themselves: nothing cancels.
template <typename scalar_t>
accumulate_t<scalar_t> squared_distance(const DriftPoints<scalar_t>& call, int64_t b, int64_t i,
                                        int64_t j) {
  using acc_t = accumulate_t<scalar_t>;
  const auto [x, step_x] = point_at(call, b, i);
  const auto [y, step_y] = point_at(call, b, j);
  acc_t sum = 0;
  const auto add = [&](int64_t step_x, int64_t step_y) {
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < call.features; ++s) {
      const acc_t difference =
          static_cast<acc_t>(x[s * step_x]) - static_cast<acc_t>(y[s * step_y]);
      sum += difference * difference;
    }
  };
  step_x == 1 && step_y == 1 ? add(1, 1) : add(step_x, step_y);
  return sum;
}

// stripes[k][M, width] = features [first + k width, first + (k + 1) width) of all points, for those
// before `end`. Several stripes at a time read longer pieces of every row.
template <typename scalar_t, typename acc_t>
void load_stripes(const DriftPoints<scalar_t>& call, int64_t b, int64_t first, int64_t end,
                  acc_t* stripes, int64_t stripe_size) {
  constexpr int64_t width = kPanelWidth<acc_t>;
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(scalar_t));
  // The next features, or the first of the next problem, come into the cache meanwhile: pieces of
  // many rows are beyond the processor's own prefetching.
  const bool last = end == call.features;
  acc_t* target = stripes;
  for (const Samples<scalar_t>& part : call.parts) {
    const scalar_t* source = part.data + b * part.batch;
    const int64_t ahead = last ? part.batch - first : end - first;
    for (int64_t i = 0; i < part.count; ++i, target += width, source += part.row) {
      acc_t* row = target;
      for (int64_t s = first; s < end; s += width, row += stripe_size) {
        const int64_t count = std::min(width, end - s);
        if (count == width && part.column == 1) {
          for (int64_t j = 0; j < width; j += line)
            __builtin_prefetch(source + s + ahead + j, 0, 2);
          for (int64_t j = 0; j < width; ++j) row[j] = static_cast<acc_t>(source[s + j]);
        } else {
          for (int64_t j = 0; j < count; ++j)
            row[j] = static_cast<acc_t>(source[(s + j) * part.column]);
          std::fill(row + count, row + width, acc_t(0));
        }
      }
    }
  }
}

// Subtracts the mean of a stripe's points, which any nearby constant may stand for: distances and
// forces do not depend on it.
template <typename acc_t>
void centre_stripe(acc_t* stripe, int64_t points) {
  using V = Vector<acc_t>;
  constexpr int64_t width = kPanelWidth<acc_t>, vectors = width / V::size();
  // Short sums, added up in double: the mean of many equal points is that point.
  constexpr int64_t kShort = 128;
  double total[width] = {};
  for (int64_t start = 0; start < points; start += kShort) {
    V sums[vectors];
    for (V& sum : sums) sum = V(acc_t(0));
    for (int64_t j = start; j < std::min(start + kShort, points); ++j) {
      for (int64_t v = 0; v < vectors; ++v)
        sums[v] = sums[v] + V::loadu(stripe + j * width + v * V::size());
    }
    alignas(64) acc_t lanes[width];
    for (int64_t v = 0; v < vectors; ++v) sums[v].store(lanes + v * V::size());
    for (int64_t s = 0; s < width; ++s) total[s] += lanes[s];
  }
  alignas(64) acc_t mean[width];
  for (int64_t s = 0; s < width; ++s)
    mean[s] = static_cast<acc_t>(total[s] / static_cast<double>(points));
  for (int64_t j = 0; j < points; ++j) {
    acc_t* row = stripe + j * width;
    for (int64_t s = 0; s < width; ++s) row[s] -= mean[s];
  }
}

// target[columns, rows] = source[rows, columns], both of one panel.
template <typename T>
inline void transpose_panel(const T* source, T* target) {
  constexpr int64_t width = kPanelWidth<T>, lanes = Vector<T>::size();
  for (int64_t i = 0; i < width; i += lanes) {
    for (int64_t j = 0; j < width; j += lanes) {
      transpose_square(source + i * width + j, width, T(1), target + j * width + i, width);
    }
  }
}

// Turns a stripe [M padded, width] of features into rows of by_point, panel_stride apart, and adds
// up the squares of each point.
template <typename T>
void transpose_stripe(const T* stripe, int64_t points, int64_t features, T* by_point,
                      int64_t panel_stride, bool add, T* squared_norms) {
  using V = Vector<T>;
  constexpr int64_t width = kPanelWidth<T>, vectors = width / V::size();
  alignas(64) T turned[width * width];
  for (int64_t panel = 0; panel < panels_of<T>(points); ++panel) {
    transpose_panel(stripe + panel * width * width, turned);
    T* target = by_point + panel * panel_stride;
    T* norms = squared_norms + panel * width;
    V sums[vectors];
    for (int64_t v = 0; v < vectors; ++v) sums[v] = V(T(0));
    for (int64_t s = 0; s < features; ++s) {
      for (int64_t v = 0; v < vectors; ++v) {
        const V x = V::loadu(turned + s * width + v * V::size());
        x.store(target + s * width + v * V::size());
        sums[v] = at::vec::fmadd(x, x, sums[v]);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      T* norm = norms + v * V::size();
      (add ? V::loadu(norm) + sums[v] : sums[v]).store(norm);
    }
  }
}

// Inner products [rows, M padded] of the generated samples from `row` on become distances. A
// product is accurate enough unless points are close; the self pair is exactly 0.
template <typename scalar_t, typename acc_t>
void products_to_distances(const DriftPoints<scalar_t>& call, int64_t b, int64_t row, int64_t rows,
                           const acc_t* norms, acc_t* values) {
  using V = Vector<acc_t>;
  const int64_t points = call.points, stride = row_length<acc_t>(points);
  const int64_t count = panel_padded<acc_t>(points);
  const V share{acc_t(kCloseShare)}, minus_two(acc_t(-2)), floor{acc_t(kMinDistance)};
  for (int64_t r = 0; r < rows; ++r) {
    acc_t* x = values + r * stride;
    const acc_t own = norms[row + r];
    x[row + r] = 0;  // not close in the eyes of the first loop
    V margin(acc_t(0));
    for (int64_t j = 0; j < count; j += V::size()) {
      const V sum = V(own) + V::loadu(norms + j);
      const V squared = at::vec::fmadd(minus_two, V::loadu(x + j), sum);
      margin = at::vec::minimum(margin, squared - share * sum);
      squared.store(x + j);
    }
    if (sum_of(margin) < 0) {
      for (int64_t j = 0; j < points; ++j) {
        if (x[j] <= acc_t(kCloseShare) * (own + norms[j]))
          x[j] = squared_distance(call, b, row + r, j);
      }
    }
    x[row + r] = 0;
    for (int64_t j = 0; j < count; j += V::size()) {
      at::vec::clamp_min(V::loadu(x + j).sqrt(), floor).store(x + j);
    }
  }
}

// sum_ij d_ij w_j of distances whose rows lie `stride` apart; weight is padded with zeros.
template <typename T>
double weighted_sum(const T* distances, int64_t rows, int64_t count, int64_t stride,
                    const T* weight) {
  using V = Vector<T>;
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    V sums[2] = {V(T(0)), V(T(0))};
    const T* row = distances + r * stride;
    for (int64_t j = 0; j < count; j += 2 * V::size()) {
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t at = j + v * V::size();
        sums[v] = at::vec::fmadd(V::loadu(row + at), V::loadu(weight + at), sums[v]);
      }
    }
    total += sum_of(sums[0] + sums[1]);
  }
  return total;
}

}  // namespace
}  // namespace driftar::cpu
