// Distances between the points of a large problem: packing, then blocks of N x M values.

#include "drift_points.h"
#include "drift_product.h"

namespace driftar::cpu {

template <Isa isa, typename scalar_t>
void DriftDistanceKernel<isa, scalar_t>::pack(const DriftBlocks<scalar_t>& call, int64_t task,
                                              acc_t* memory) {
  constexpr int64_t width = kPanelWidth<acc_t>;
  const int64_t stripes = panels_of<acc_t>(call.features), points = call.points;
  const int64_t b = task / stripes, first = task % stripes * width;
  const int64_t padded_points = panel_padded<acc_t>(points);
  acc_t* stripe = call.by_feature == nullptr ? memory : call.by_feature + task * points * width;
  load_stripes(call, b, first, std::min(first + width, call.features), stripe, 0);
  centre_stripe(stripe, points);
  if (call.by_point == nullptr) return;
  if (stripe != memory) std::copy_n(stripe, points * width, memory);
  std::fill(memory + points * width, memory + padded_points * width, acc_t(0));
  transpose_stripe(memory, points, std::min(width, call.features - first),
                   call.by_point + (b * padded_points * call.features) + first * width,
                   call.features * width, false, call.squared_norms + task * padded_points);
}

template <Isa isa, typename scalar_t>
void DriftDistanceKernel<isa, scalar_t>::merge_norms(const DriftBlocks<scalar_t>& call,
                                                     int64_t task) {
  const int64_t stripes = panels_of<acc_t>(call.features);
  const int64_t size = panel_padded<acc_t>(call.points);
  acc_t* norms = call.squared_norms + task * stripes * size;
  for (int64_t stripe = 1; stripe < stripes; ++stripe) {
    for (int64_t j = 0; j < size; ++j) norms[j] += norms[stripe * size + j];
  }
}

template <Isa isa, typename scalar_t>
void DriftDistanceKernel<isa, scalar_t>::distances(const DriftBlocks<scalar_t>& call, int64_t b,
                                                   int64_t row, int64_t rows, acc_t* out) {
  const int64_t size = panel_padded<acc_t>(call.points), features = call.features;
  const acc_t* by_point = call.by_point + b * size * features;
  for (int64_t start = 0; start < features; start += kDepth) {
    inner_products(by_point + start * kPanelWidth<acc_t>, features * kPanelWidth<acc_t>,
                   std::min(kDepth, features - start), row, rows, call.points, start > 0, out,
                   row_length<acc_t>(call.points));
  }
  products_to_distances(call, b, row, rows,
                        call.squared_norms + b * panels_of<acc_t>(features) * size, out);
}

template <Isa isa, typename scalar_t>
double DriftDistanceKernel<isa, scalar_t>::weighted_distance(const DriftBlocks<scalar_t>& call,
                                                             int64_t task, acc_t* memory) {
  const int64_t b = task / call.blocks(), row = task % call.blocks() * call.height;
  const int64_t rows = std::min(call.height, call.generated - row);
  const int64_t points = call.points, stride = row_length<acc_t>(points);
  acc_t* values = memory;
  acc_t* weight = values + rows * stride;
  distances(call, b, row, rows, values);
  std::fill(std::copy_n(call.weight + b * points, points, weight), weight + stride, acc_t(0));
  if (call.distances != nullptr) {
    acc_t* kept = call.distances + (b * call.generated + row) * points;
    for (int64_t r = 0; r < rows; ++r) std::copy_n(values + r * stride, points, kept + r * points);
  }
  return weighted_sum(values, rows, panel_padded<acc_t>(points), stride, weight);
}

template struct DriftDistanceKernel<Isa::DRIFTAR_ISA, float>;
template struct DriftDistanceKernel<Isa::DRIFTAR_ISA, double>;
template struct DriftDistanceKernel<Isa::DRIFTAR_ISA, c10::BFloat16>;
template struct DriftDistanceKernel<Isa::DRIFTAR_ISA, c10::Half>;

}  // namespace driftar::cpu
