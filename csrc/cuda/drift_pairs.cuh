#pragma once

// What the passes over pairs of points have in common: the published floors, where a point lies,
// affinities.

#include "drift.h"
#include "launch.cuh"
#include "numbers.cuh"

namespace driftar::cuda {

constexpr float kMinDistance = 1e-4f, kMinScale = 1e-3f, kMinAffinity = 1e-3f,
                kSelfDistance = 100.0f;
// Squared distances below this share of the squared norms lose too much to cancellation.
constexpr float kCloseShare = 0.1f;

// The smaller one; NaN wins.
__device__ __forceinline__ float least_of(float a, float b) { return a != a || a < b ? a : b; }
__device__ __forceinline__ float sum_of(float a, float b) { return a + b; }

// At least `floor`; NaN stays.
__device__ __forceinline__ float at_least(float floor, float value) {
  return value < floor ? floor : value;
}

// Number `point` of the parts in their order: its part, and its row there.
struct Place {
  const Samples& part;
  int64_t row;

  static __device__ __forceinline__ Place of(const Samples (&parts)[3], int64_t point) {
    int part = 0;
    while (part < 2 && point >= parts[part].count) point -= parts[part++].count;
    return {parts[part], point};
  }

  template <typename T>
  __device__ __forceinline__ const T* at(int64_t b, int64_t feature) const {
    return static_cast<const T*>(part.data) + b * part.batch + row * part.row +
           feature * part.column;
  }
};

// What distances and raw forces are divided by.
__device__ __forceinline__ float distance_unit(const PairsCall& call) {
  return at_least(kMinScale, *call.scale);
}
__device__ __forceinline__ float force_unit(const PairsCall& call) {
  return at_least(kMinScale, *call.scale / sqrtf(static_cast<float>(call.features)));
}

// a_ij of the scaled distance and the halves of its row's and column's log-sum-exp, weighted.
__device__ __forceinline__ float affinity(float scaled, float rate, float row_half,
                                          float column_half, float weight) {
  return at_least(kMinAffinity, expf(-scaled * rate - row_half - column_half)) * weight;
}

}  // namespace driftar::cuda
