#pragma once

// The drifting field on the GPU as its launchers see it: B problems of N generated samples among M
// points, which lie in the order gen, neg, pos. Algebra: docs/ops/drift.md.

#include "drift_plan.h"
#include "scalar.h"

#include <cuda_runtime.h>

#include <cstdint>

namespace driftar::cuda {

// Tensors that products read in whole chunks are padded to this many columns.
constexpr int64_t kPadding = 32;
__host__ __device__ inline int64_t padded(int64_t count) {
  return (count + kPadding - 1) / kPadding * kPadding;
}

// Distances of so many pairs are held at a time, unless they are kept. Tests set it lower.
#ifndef DRIFTAR_PANEL_ELEMENTS
#define DRIFTAR_PANEL_ELEMENTS 1 << 24
#endif
constexpr int64_t kPanelElements = DRIFTAR_PANEL_ELEMENTS;

// Generated samples, negatives or positives [B, count, S]; strides in elements. `vectors`: rows can
// be copied 16 aligned bytes at a time.
struct Samples {
  const void* data;
  int64_t count, batch, row, column;
  bool vectors;
};

struct CentreCall {
  Scalar type;
  int64_t batch, points, features;
  Samples parts[3];
  float* centred;  // [B, M, padded S], zeros behind S
};

// What all passes over pairs share. A panel is the generated samples [first_row, first_row + rows).
struct PairsCall {
  int64_t batch, generated, points, positives, features;
  const float* centred;  // [B, M, padded S]
  const float* weight;   // [B, M]
  const float* scale;    // scalar; not of the distances
  int64_t first_row, rows;
  int temperature_count;
  float inverse_temperatures[kMaxTemperatures];
};

struct DistanceCall : PairsCall {
  float* distances;  // [B, rows, M], or null
  float* partial;    // [distance_blocks]: sums of weighted distances, or null
};

// What one temperature needs besides the distances to have its coefficients again: half the
// log-sum-exps of rows and columns, and the sums A- and A+ of every row.
struct Balance {
  float *row_half, *repulsion, *attraction;  // [N]
  float* column_half;                        // [M]
};

// Of balances [B, T, 3 N + M].
__host__ __device__ inline Balance balance_of(const PairsCall& call, float* balances, int64_t b,
                                              int64_t t) {
  const int64_t n = call.generated;
  float* own = balances + (b * call.temperature_count + t) * (3 * n + call.points);
  return {own, own + n, own + 2 * n, own + 3 * n};
}

struct NormaliserCall : PairsCall {
  const float* distances;  // [B, rows, M]
  // Until the last panel, column_half holds the sum of exp((least - D) / R) of the rows up to here.
  float* balances;
  float* column_least;  // [B, M]: least scaled distance of the rows up to here
};

struct ForceCall : PairsCall {
  const float* distances;  // [B, rows, M]
  float* balances;         // their halves are given; repulsion and attraction are set, or
  bool balanced;           // given as well
  const float* factors;    // [T], of the temperatures in the sum; null: `temperature`
  int temperature;         // alone counts
  float* coefficients;     // [B, rows, padded M], scratch
  float* force;            // [B, N, S], or null
  float* partial;          // [force_blocks]: sums of squares, or null
};

// Many small problems, each in a block of its own; nothing is centred or padded before.
struct BatchCall : PairsCall {
  Scalar type;
  Samples parts[3];
  const float* kept;     // [B, N, M] distances, or null: they are computed again
  float* distances;      // [B, N, M], or null
  float* partial;        // [B]: sums of weighted distances; [B, T]: sums of squared raw forces
  float* balances;       // [B, T, 3 N + M]
  int together;          // temperatures_together
  const float* factors;  // [T]
  float* force;          // [B, N, S]
};

int64_t distance_blocks(const PairsCall& call);
int64_t force_blocks(const PairsCall& call);

cudaError_t launch_centre(const CentreCall& call, cudaStream_t stream);
cudaError_t launch_distances(const DistanceCall& call, cudaStream_t stream);
cudaError_t launch_normalisers(const NormaliserCall& call, cudaStream_t stream);
cudaError_t launch_force(const ForceCall& call, cudaStream_t stream);

// Distances and the sums of the weighted ones; balances and sums of squares of the raw forces;
// the combined force.
cudaError_t launch_batch_distances(const BatchCall& call, cudaStream_t stream);
cudaError_t launch_batch_squares(const BatchCall& call, cudaStream_t stream);
cudaError_t launch_batch_force(const BatchCall& call, cudaStream_t stream);

}  // namespace driftar::cuda
