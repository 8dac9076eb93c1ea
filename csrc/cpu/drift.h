#pragma once

// The drifting field on the CPU as its kernel sees it. B problems of N generated samples among M
// points; the points of a problem lie in the order gen, neg, pos. Work is dealt out in panels of
// generated samples.

#include "../common/accumulate.h"
#include "isa.h"

#include <algorithm>
#include <cstdint>

namespace driftar::cpu {

// Generated samples, negatives or positives [B, count, S]; strides in elements.
template <typename T>
struct Samples {
  const T* data;
  int64_t count, batch, row, column;
};

template <typename scalar_t>
struct DriftProblem {
  using acc_t = accumulate_t<scalar_t>;
  int64_t batch, generated, points, positives, features;
  int64_t panel;  // generated samples per panel
  Samples<scalar_t> parts[3];
  const acc_t* weight;   // [B, M]
  acc_t* centred;        // [B, M, S]: points minus their mean
  acc_t* squared_norms;  // [B, M]
  acc_t* distances;      // [B, N, M], or null when they are not kept

  int64_t panels() const { return (generated + panel - 1) / panel; }
};

template <typename scalar_t>
struct DriftForce : DriftProblem<scalar_t> {
  using acc_t = accumulate_t<scalar_t>;
  const acc_t* kept;          // [B, N, M] or null
  acc_t scale;                // global mean distance
  const acc_t* temperatures;  // [T]
  int64_t temperature_count;
  int64_t chunks;     // panels of a problem are dealt out to this many column statistics
  acc_t* row_lse;     // [B, T, N]
  acc_t* column_max;  // [B, chunks, T, M]; after merge_columns chunk 0 holds the log-sum-exp
  acc_t* column_sum;  // [B, chunks, T, M]
  acc_t* force;       // [T, B, N, S]
  double* squares;    // [B, panels, T]
};

// A panel of distances is at most this many elements, but at least 8 and at most 64 samples high.
constexpr int64_t kPanelElements = 1 << 19;

inline int64_t panel_height(int64_t generated, int64_t points) {
  const int64_t height = std::clamp<int64_t>(kPanelElements / std::max<int64_t>(points, 1), 8, 64);
  return std::min(height, generated);
}

// Two panels, each padded for whole vectors: distances and logits or affinities.
template <typename scalar_t>
int64_t drift_scratch(const DriftProblem<scalar_t>& problem) {
  return 2 * problem.panel * (problem.points + 16) + 2 * (problem.points + 16);
}

template <Isa isa, typename scalar_t>
struct DriftKernel {
  using acc_t = accumulate_t<scalar_t>;

  // task = sample: fills centred and squared_norms.
  static void centre(const DriftProblem<scalar_t>& call, int64_t task);

  // task = (sample, panel): keeps the distances if asked to; returns sum_ij d_ij w_j.
  static double weighted_distance(const DriftProblem<scalar_t>& call, int64_t task, acc_t* memory);

  // task = (sample, chunk): log-sum-exp of the rows, statistics of the columns.
  static void normalisers(const DriftForce<scalar_t>& call, int64_t task, acc_t* memory);

  // task = sample: merges the chunks' column statistics into log-sum-exps.
  static void merge_columns(const DriftForce<scalar_t>& call, int64_t task);

  // task = (sample, panel): forces of all temperatures and their squares.
  static void force(const DriftForce<scalar_t>& call, int64_t task, acc_t* memory);
};

}  // namespace driftar::cpu
