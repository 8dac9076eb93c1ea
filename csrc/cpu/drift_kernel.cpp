// For every temperature R, with D = d / max(scale, 1e-3) and 100 added between a sample and itself:
//
//   l_ij = -D_ij / R
//   a_ij = max(exp(l_ij - (lse_row_i + lse_col_j) / 2), 1e-3) w_j
//   F_i  = (A-_i sum_pos a_ij y_j - A+_i sum_neg a_ij y_j) / scale_inputs
//
// A+ and A- are the sums of a over the positives and over the rest. The coefficients of a row sum
// to zero, so the points y may be centred, which is what keeps the distances of close points
// accurate.

#include "drift.h"
#include "gemm.h"
#include "vector.h"

#include <cmath>

namespace driftar::cpu {

namespace {

constexpr double kMinDistance = 1e-4;
constexpr double kMinScale = 1e-3;
constexpr double kMinAffinity = 1e-3;
constexpr double kSelfDistance = 100;
// Squared distances below this share of the squared norms lose too much to cancellation.
constexpr double kCloseShare = 0.1;

struct Panel {
  int64_t b, row, rows;
};

template <typename scalar_t>
Panel panel_at(const DriftProblem<scalar_t>& call, int64_t b, int64_t index) {
  const int64_t row = index * call.panel;
  return {b, row, std::min(call.panel, call.generated - row)};
}

template <typename T>
T squared_distance(const T* a, const T* b, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < count; ++s) sum += (a[s] - b[s]) * (a[s] - b[s]);
  return sum;
}

// Distances [rows, M] of a panel of generated samples to all points, by a matrix product where that
// is accurate and from differences where points are close.
template <typename scalar_t, typename acc_t>
void distance_panel(const DriftProblem<scalar_t>& call, const Panel& panel, acc_t* distances) {
  const int64_t points = call.points, features = call.features;
  const acc_t* all = call.centred + panel.b * points * features;
  const acc_t* generated = all + panel.row * features;
  const acc_t* norms = call.squared_norms + panel.b * points;
  gemm<acc_t>(Layout::normal, Layout::transposed, panel.rows, points, features, acc_t(-2),
              generated, features, all, features, acc_t(0), distances, points);
  for (int64_t r = 0; r < panel.rows; ++r) {
    const acc_t own = norms[panel.row + r];
    acc_t* row = distances + r * points;
    for (int64_t j = 0; j < points; ++j) {
      const acc_t sum = own + norms[j];
      acc_t squared = sum + row[j];
      if (squared < acc_t(kCloseShare) * sum) {
        squared = j == panel.row + r
                      ? acc_t(0)
                      : squared_distance(generated + r * features, all + j * features, features);
      }
      row[j] = squared;
    }
    for (int64_t j = 0; j < points; ++j) {
      const acc_t distance = std::sqrt(row[j]);
      row[j] = distance < acc_t(kMinDistance) ? acc_t(kMinDistance) : distance;
    }
  }
}

// Negative D_ij, i.e. logits at temperature 1, of a panel.
template <typename scalar_t, typename acc_t>
void logit_panel(const DriftForce<scalar_t>& call, const Panel& panel, acc_t* logits) {
  const int64_t points = call.points;
  const acc_t* distances = logits;
  if (call.kept != nullptr) {
    distances = call.kept + (panel.b * call.generated + panel.row) * points;
  } else {
    distance_panel(call, panel, logits);
  }
  const acc_t factor = acc_t(-1) / std::max(call.scale, acc_t(kMinScale));
  for (int64_t i = 0; i < panel.rows * points; ++i) logits[i] = distances[i] * factor;
  for (int64_t r = 0; r < panel.rows; ++r)
    logits[r * points + panel.row + r] -= acc_t(kSelfDistance);
}

// maximum = max(maximum, row), elementwise.
template <typename T>
void raise_maxima(const T* row, int64_t count, T* maximum) {
  for (int64_t j = 0; j < count; ++j) maximum[j] = row[j] > maximum[j] ? row[j] : maximum[j];
}

// target += exp(row - shift), elementwise, on rows padded to whole vectors.
template <typename T>
void add_shifted_exponentials(const T* row, const T* shift, int64_t count, T* target) {
  for (int64_t j = 0; j < count; j += Vector<T>::size()) {
    const Vector<T> e = (Vector<T>::loadu(row + j) - Vector<T>::loadu(shift + j)).exp();
    (Vector<T>::loadu(target + j) + e).store(target + j);
  }
}

}  // namespace

template <Isa isa, typename scalar_t>
void DriftKernel<isa, scalar_t>::centre(const DriftProblem<scalar_t>& call, int64_t task) {
  const int64_t features = call.features;
  acc_t* all = call.centred + task * call.points * features;
  acc_t* target = all;
  for (const Samples<scalar_t>& part : call.parts) {
    for (int64_t i = 0; i < part.count; ++i, target += features) {
      const scalar_t* source = part.data + task * part.batch + i * part.row;
      for (int64_t s = 0; s < features; ++s)
        target[s] = static_cast<acc_t>(source[s * part.column]);
    }
  }
  // The mean is taken in double, in stripes of features that fit a register file's worth of stack.
  constexpr int64_t kStripe = 256;
  for (int64_t first = 0; first < features; first += kStripe) {
    const int64_t width = std::min(kStripe, features - first);
    double mean[kStripe] = {};
    for (int64_t j = 0; j < call.points; ++j) {
      for (int64_t s = 0; s < width; ++s) mean[s] += all[j * features + first + s];
    }
    for (int64_t s = 0; s < width; ++s) mean[s] /= static_cast<double>(call.points);
    for (int64_t j = 0; j < call.points; ++j) {
      acc_t* row = all + j * features + first;
      for (int64_t s = 0; s < width; ++s) row[s] = static_cast<acc_t>(row[s] - mean[s]);
    }
  }
  for (int64_t j = 0; j < call.points; ++j) {
    acc_t sum = 0;
    const acc_t* row = all + j * features;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < features; ++s) sum += row[s] * row[s];
    call.squared_norms[task * call.points + j] = sum;
  }
}

template <Isa isa, typename scalar_t>
double DriftKernel<isa, scalar_t>::weighted_distance(const DriftProblem<scalar_t>& call,
                                                     int64_t task, acc_t* memory) {
  const Panel panel = panel_at(call, task / call.panels(), task % call.panels());
  const int64_t points = call.points;
  acc_t* distances = call.distances == nullptr
                         ? memory
                         : call.distances + (panel.b * call.generated + panel.row) * points;
  distance_panel(call, panel, distances);
  const acc_t* weight = call.weight + panel.b * points;
  double sum = 0;
  for (int64_t r = 0; r < panel.rows; ++r) {
    const acc_t* row = distances + r * points;
    for (int64_t j = 0; j < points; ++j) sum += static_cast<double>(row[j]) * weight[j];
  }
  return sum;
}

template <Isa isa, typename scalar_t>
void DriftKernel<isa, scalar_t>::normalisers(const DriftForce<scalar_t>& call, int64_t task,
                                             acc_t* memory) {
  const int64_t b = task / call.chunks, chunk = task % call.chunks;
  const int64_t points = call.points, stride = padded<acc_t>(points);
  acc_t* logits = memory;
  acc_t* scaled = logits + call.panel * stride;
  acc_t* maximum = scaled + call.panel * stride;
  acc_t* sum = maximum + stride;
  const acc_t hidden = -std::numeric_limits<acc_t>::infinity();

  const int64_t statistics = task * call.temperature_count * points;
  std::fill_n(call.column_max + statistics, call.temperature_count * points, hidden);
  std::fill_n(call.column_sum + statistics, call.temperature_count * points, acc_t(0));
  for (int64_t index = chunk; index < call.panels(); index += call.chunks) {
    const Panel panel = panel_at(call, b, index);
    logit_panel(call, panel, logits);
    for (int64_t t = 0; t < call.temperature_count; ++t) {
      const acc_t inverse = acc_t(1) / call.temperatures[t];
      acc_t* column_max = call.column_max + statistics + t * points;
      acc_t* column_sum = call.column_sum + statistics + t * points;
      std::copy_n(column_max, points, maximum);
      std::fill(maximum + points, maximum + stride, acc_t(0));
      for (int64_t r = 0; r < panel.rows; ++r) {
        acc_t* row = scaled + r * stride;
        for (int64_t j = 0; j < points; ++j) row[j] = logits[r * points + j] * inverse;
        std::fill(row + points, row + stride, hidden);
        const acc_t top = row_maximum(row, stride);
        acc_t total, moment;
        row_exponentials(row, stride, top, static_cast<acc_t*>(nullptr), total, moment);
        call.row_lse[(b * call.temperature_count + t) * call.generated + panel.row + r] =
            top + std::log(total);
        raise_maxima(row, points, maximum);
      }
      for (int64_t j = 0; j < points; ++j)
        sum[j] = column_sum[j] * std::exp(column_max[j] - maximum[j]);
      std::fill(sum + points, sum + stride, acc_t(0));
      for (int64_t r = 0; r < panel.rows; ++r) {
        add_shifted_exponentials(scaled + r * stride, maximum, stride, sum);
      }
      std::copy_n(maximum, points, column_max);
      std::copy_n(sum, points, column_sum);
    }
  }
}

template <Isa isa, typename scalar_t>
void DriftKernel<isa, scalar_t>::merge_columns(const DriftForce<scalar_t>& call, int64_t task) {
  const int64_t size = call.temperature_count * call.points;
  acc_t* maximum = call.column_max + task * call.chunks * size;
  acc_t* sum = call.column_sum + task * call.chunks * size;
  for (int64_t j = 0; j < size; ++j) {
    acc_t top = maximum[j];
    for (int64_t chunk = 1; chunk < call.chunks; ++chunk)
      top = std::max(top, maximum[chunk * size + j]);
    acc_t total = 0;
    for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
      total += sum[chunk * size + j] * std::exp(maximum[chunk * size + j] - top);
    }
    maximum[j] = top + std::log(total);
  }
}

template <Isa isa, typename scalar_t>
void DriftKernel<isa, scalar_t>::force(const DriftForce<scalar_t>& call, int64_t task,
                                       acc_t* memory) {
  const int64_t index = task % call.panels();
  const Panel panel = panel_at(call, task / call.panels(), index);
  const int64_t points = call.points, features = call.features;
  const int64_t negatives = points - call.positives, stride = padded<acc_t>(points);
  acc_t* logits = memory;
  acc_t* coefficients = logits + call.panel * stride;
  const acc_t* all = call.centred + panel.b * points * features;
  const acc_t* weight = call.weight + panel.b * points;
  const acc_t unit =
      std::max(call.scale / std::sqrt(static_cast<acc_t>(features)), acc_t(kMinScale));

  logit_panel(call, panel, logits);
  for (int64_t t = 0; t < call.temperature_count; ++t) {
    const acc_t inverse = acc_t(1) / call.temperatures[t];
    const acc_t* column_lse =
        call.column_max + (panel.b * call.chunks * call.temperature_count + t) * points;
    const acc_t* row_lse =
        call.row_lse + (panel.b * call.temperature_count + t) * call.generated + panel.row;
    for (int64_t r = 0; r < panel.rows; ++r) {
      acc_t* row = coefficients + r * stride;
      for (int64_t j = 0; j < points; ++j) {
        row[j] = logits[r * points + j] * inverse - acc_t(0.5) * (row_lse[r] + column_lse[j]);
      }
      std::fill(row + points, row + stride, acc_t(0));
      const Vector<acc_t> floor{acc_t(kMinAffinity)};
      for (int64_t j = 0; j < stride; j += Vector<acc_t>::size()) {
        at::vec::maximum(Vector<acc_t>::loadu(row + j).exp(), floor).store(row + j);
      }
      acc_t repel = 0, attract = 0;
      for (int64_t j = 0; j < negatives; ++j) repel += row[j] *= weight[j];
      for (int64_t j = negatives; j < points; ++j) attract += row[j] *= weight[j];
      for (int64_t j = 0; j < negatives; ++j) row[j] *= -attract;
      for (int64_t j = negatives; j < points; ++j) row[j] *= repel;
    }
    acc_t* force =
        call.force + ((t * call.batch + panel.b) * call.generated + panel.row) * features;
    gemm<acc_t>(Layout::normal, Layout::normal, panel.rows, features, points, acc_t(1) / unit,
                coefficients, stride, all, features, acc_t(0), force, features);
    double squares = 0;
    for (int64_t i = 0; i < panel.rows * features; ++i) {
      squares += static_cast<double>(force[i]) * force[i];
    }
    call.squares[task * call.temperature_count + t] = squares;
  }
}

template struct DriftKernel<Isa::DRIFTAR_ISA, float>;
template struct DriftKernel<Isa::DRIFTAR_ISA, double>;
template struct DriftKernel<Isa::DRIFTAR_ISA, c10::BFloat16>;
template struct DriftKernel<Isa::DRIFTAR_ISA, c10::Half>;

}  // namespace driftar::cpu
