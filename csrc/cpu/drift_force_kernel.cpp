// Forces of a large problem, for every temperature R:
//
//   F_i = (A-_i sum_pos a_ij y_j - A+_i sum_neg a_ij y_j) / scale_inputs
//
// A+ and A- are the sums of a over the positives and over the rest; a is in drift_softmax.h. The
// coefficients of a row sum to zero, so the points y may be centred, which is what keeps the
// distances of close points accurate.

#include "drift_product.h"
#include "drift_softmax.h"

namespace driftar::cpu {

namespace {

struct Block {
  int64_t b, row, rows;
};

template <typename scalar_t>
Block block_at(const DriftBlocks<scalar_t>& call, int64_t b, int64_t index) {
  const int64_t row = index * call.height;
  return {b, row, std::min(call.height, call.generated - row)};
}

// D of a block; `scaled` may hold the distances meanwhile.
template <Isa isa, typename scalar_t, typename acc_t>
void scaled_block(const DriftForces<scalar_t>& call, const Block& block, acc_t* scaled,
                  Minima<acc_t>& minima) {
  const int64_t points = call.points;
  const acc_t* distances = scaled;
  int64_t stride = row_length<acc_t>(points);
  if (call.kept != nullptr) {
    distances = call.kept + (block.b * call.generated + block.row) * points;
    stride = points;
  } else {
    DriftDistanceKernel<isa, scalar_t>::distances(call, block.b, block.row, block.rows, scaled);
  }
  scale_distances(distances, stride, block.row, block.rows, points, call.scale, scaled, minima);
}

}  // namespace

template <Isa isa, typename scalar_t>
void DriftForceKernel<isa, scalar_t>::normalisers(const DriftForces<scalar_t>& call, int64_t task,
                                                  acc_t* memory) {
  const int64_t b = task / call.chunks, chunk = task % call.chunks;
  const int64_t stride = row_length<acc_t>(call.points), count = call.temperature_count;
  acc_t row_minima[kBlockRows];
  acc_t* scaled = memory;
  acc_t* shifts = scaled + call.height * stride;
  acc_t* sums = shifts + stride;
  Minima<acc_t> minima{0, 0, row_minima, sums + stride};

  acc_t* column_min = call.column_min + task * count * stride;
  acc_t* column_sum = call.column_sum + task * count * stride;
  std::fill_n(column_min, count * stride, std::numeric_limits<acc_t>::infinity());
  std::fill_n(column_sum, count * stride, acc_t(0));
  for (int64_t index = chunk; index < call.blocks(); index += call.chunks) {
    const Block block = block_at(call, b, index);
    scaled_block<isa>(call, block, scaled, minima);
    for (int64_t t = 0; t < count; ++t) {
      const acc_t inverse = acc_t(1) / call.temperatures[t];
      softmax_sums(scaled, block.rows, stride, minima, inverse,
                   call.row_half + (b * count + t) * call.generated + block.row, shifts, sums);
      merge_shifted(column_min + t * stride, column_sum + t * stride, shifts, sums, stride,
                    inverse);
    }
  }
}

template <Isa isa, typename scalar_t>
void DriftForceKernel<isa, scalar_t>::merge_columns(const DriftForces<scalar_t>& call,
                                                    int64_t task) {
  const int64_t stride = row_length<acc_t>(call.points), count = call.temperature_count;
  acc_t* column_min = call.column_min + task * call.chunks * count * stride;
  acc_t* column_sum = call.column_sum + task * call.chunks * count * stride;
  for (int64_t t = 0; t < count; ++t, column_min += stride, column_sum += stride) {
    const acc_t inverse = acc_t(1) / call.temperatures[t];
    for (int64_t chunk = 1; chunk < call.chunks; ++chunk) {
      const int64_t offset = chunk * count * stride;
      merge_shifted(column_min, column_sum, column_min + offset, column_sum + offset, stride,
                    inverse);
    }
    for (int64_t j = 0; j < call.points; ++j)
      column_min[j] = half_lse(column_sum[j], column_min[j], inverse);
    std::fill(column_min + call.points, column_min + stride, acc_t(0));
  }
}

template <Isa isa, typename scalar_t>
void DriftForceKernel<isa, scalar_t>::force(const DriftForces<scalar_t>& call, int64_t task,
                                            acc_t* memory) {
  constexpr int64_t width = kPanelWidth<acc_t>;
  const Block block = block_at(call, task / call.blocks(), task % call.blocks());
  const int64_t points = call.points, features = call.features, count = call.temperature_count;
  const int64_t stride = row_length<acc_t>(points), stripes = panels_of<acc_t>(features);
  acc_t row_minima[kBlockRows];
  acc_t* scaled = memory;
  acc_t* coefficients = scaled + call.height * stride;
  acc_t* w_neg = coefficients + call.height * stride;
  acc_t* w_pos = w_neg + stride;
  Minima<acc_t> minima{0, 0, row_minima, w_pos + stride};
  acc_t* sums = minima.column + stride;
  const acc_t unit =
      std::max(call.scale / std::sqrt(static_cast<acc_t>(features)), acc_t(kMinScale));

  scaled_block<isa>(call, block, scaled, minima);
  split_weights(call.weight + block.b * points, call.negatives(), points, w_neg, w_pos);
  for (int64_t t = 0; t < count; ++t) {
    const acc_t inverse = acc_t(1) / call.temperatures[t];
    const acc_t* column_half = call.column_min + (block.b * call.chunks * count + t) * stride;
    const acc_t* row_half = call.row_half + (block.b * count + t) * call.generated + block.row;
    for (int64_t r = 0; r < block.rows; ++r) {
      acc_t* row = coefficients + r * stride;
      affinity_row(scaled + r * stride, stride, inverse, row_half[r], column_half, row);
      coefficient_row(row, stride, w_neg, w_pos, acc_t(1) / unit, row);
    }
    acc_t* force =
        call.force + ((t * call.batch + block.b) * call.generated + block.row) * features;
    double squares = 0;
    for (int64_t stripe = 0; stripe < stripes; ++stripe) {
      weighted_sums(block.rows, points, coefficients, stride,
                    call.by_feature + (block.b * stripes + stripe) * points * width, sums);
      squares += sum_of_squares(sums, block.rows * width);
      const int64_t columns = std::min(width, features - stripe * width);
      for (int64_t r = 0; r < block.rows; ++r)
        std::copy_n(sums + r * width, columns, force + r * features + stripe * width);
    }
    call.squares[task * count + t] = squares;
  }
}

template <Isa isa, typename scalar_t>
void DriftForceKernel<isa, scalar_t>::sum(const DriftSum<acc_t>& call, int64_t task) {
  const int64_t b = task / call.pieces(), first = task % call.pieces() * kSumPiece;
  const int64_t count = std::min(kSumPiece, call.size - first);
  acc_t* sum = call.sum + b * call.size + first;
  std::fill_n(sum, count, acc_t(0));
  for (int64_t t = 0; t < call.temperature_count; ++t) {
    const acc_t* force = call.forces + (t * call.batch + b) * call.size + first;
    const acc_t factor = call.factors[t];
    for (int64_t i = 0; i < count; ++i) sum[i] += factor * force[i];
  }
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) {
    squares += static_cast<double>(sum[i]) * static_cast<double>(sum[i]);
  }
  call.squares[task] = squares;
}

template struct DriftForceKernel<Isa::DRIFTAR_ISA, float>;
template struct DriftForceKernel<Isa::DRIFTAR_ISA, double>;
template struct DriftForceKernel<Isa::DRIFTAR_ISA, c10::BFloat16>;
template struct DriftForceKernel<Isa::DRIFTAR_ISA, c10::Half>;

}  // namespace driftar::cpu
