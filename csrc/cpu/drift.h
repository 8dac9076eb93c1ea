#pragma once

// The drifting field on the CPU as its kernels see it. B problems of N generated samples among M
// points; the points of a problem lie in the order gen, neg, pos.
//
// Points are centred and packed into panels of kPanelWidth columns, either features as columns
// (by_feature [stripes, M, width], the right factor of the forces) or points as columns (by_point
// [stripes, S, width], the factors of the distances). Columns beyond the last are zero.

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
struct DriftPoints {
  using acc_t = accumulate_t<scalar_t>;
  int64_t batch, generated, points, positives, features;
  Samples<scalar_t> parts[3];
  const acc_t* weight;  // [B, M]

  int64_t negatives() const { return points - positives; }  // with the generated samples
};

// Two of the widest vectors.
template <typename T>
constexpr int64_t kPanelWidth = 128 / static_cast<int64_t>(sizeof(T));

template <typename T>
constexpr int64_t panels_of(int64_t columns) {
  return (columns + kPanelWidth<T> - 1) / kPanelWidth<T>;
}

template <typename T>
constexpr int64_t panel_padded(int64_t columns) {
  return panels_of<T>(columns) * kPanelWidth<T>;
}

// Length of a row of M values: padded, and such that rows do not all fall into the same cache sets.
template <typename T>
constexpr int64_t row_length(int64_t points) {
  const int64_t padded = panel_padded<T>(points);
  return padded % (2048 / static_cast<int64_t>(sizeof(T))) == 0 ? padded + kPanelWidth<T> : padded;
}

// One large problem: work is dealt out in blocks of generated samples.

// A block of N x M values is at most this many, but at least 8 and at most 64 samples high.
constexpr int64_t kBlockElements = 1 << 19;
constexpr int64_t kBlockRows = 64;

// Elements of the sum of the temperatures that a task forms, in the first-level cache.
constexpr int64_t kSumPiece = 1 << 12;

// A multiple of 8, which divides every panel width.
inline int64_t block_height(int64_t points) {
  const int64_t height = kBlockElements / std::max<int64_t>(points, 1);
  return std::clamp<int64_t>(height, 8, kBlockRows) / 8 * 8;
}

template <typename scalar_t>
struct DriftBlocks : DriftPoints<scalar_t> {
  using acc_t = accumulate_t<scalar_t>;
  int64_t height = 0;              // generated samples per block
  acc_t* by_feature = nullptr;     // [B, stripes, M, width], unless only distances are wanted
  acc_t* by_point = nullptr;       // [B, stripes, S, width], unless distances are given
  acc_t* squared_norms = nullptr;  // [B, feature stripes, M padded]; merge_norms leaves the sums
                                   // in the first stripe
  acc_t* distances = nullptr;      // [B, N, M] to be kept, or null

  int64_t blocks() const { return (this->generated + height - 1) / height; }
};

template <typename scalar_t>
struct DriftForces : DriftBlocks<scalar_t> {
  using acc_t = accumulate_t<scalar_t>;
  const acc_t* kept = nullptr;          // [B, N, M] or null
  acc_t scale = 0;                      // global mean distance
  const acc_t* temperatures = nullptr;  // [T]
  int64_t temperature_count = 0;
  int64_t chunks = 0;           // blocks of a problem are dealt out to this many column statistics
  acc_t* row_half = nullptr;    // [B, T, N]: half the log-sum-exp of a row
  acc_t* column_min = nullptr;  // [B, chunks, T, M padded]; merge_columns leaves half the
                                // log-sum-exp in the first chunk
  acc_t* column_sum = nullptr;  // [B, chunks, T, M padded]
  acc_t* force = nullptr;       // [T, B, N, S]
  double* squares = nullptr;    // [B, blocks, T]
};

// The sum over the temperatures of their forces [T, B, size], size = N S.
template <typename acc_t>
struct DriftSum {
  int64_t batch, size, temperature_count;
  const acc_t* forces;   // [T, B, size]
  const acc_t* factors;  // [T]
  acc_t* sum;            // [B, size]
  double* squares;       // [B, pieces]

  int64_t pieces() const { return (size + kSumPiece - 1) / kSumPiece; }
};

// Two blocks of N x M values and three rows.
template <typename acc_t>
int64_t block_scratch(int64_t height, int64_t points) {
  return (2 * height + 3) * row_length<acc_t>(points) + kBlockRows * kPanelWidth<acc_t>;
}

template <Isa isa, typename scalar_t>
struct DriftDistanceKernel {
  using acc_t = accumulate_t<scalar_t>;

  // task = (sample, feature stripe): fills by_feature or by_point and squared_norms. Scratch: one
  // stripe [M padded, width].
  static void pack(const DriftBlocks<scalar_t>& call, int64_t task, acc_t* memory);

  // task = sample
  static void merge_norms(const DriftBlocks<scalar_t>& call, int64_t task);

  // task = (sample, block): keeps the distances if asked to; returns sum_ij d_ij w_j.
  static double weighted_distance(const DriftBlocks<scalar_t>& call, int64_t task, acc_t* memory);

  // Distances [rows, M padded] of a block to all points.
  static void distances(const DriftBlocks<scalar_t>& call, int64_t b, int64_t row, int64_t rows,
                        acc_t* out);
};

template <Isa isa, typename scalar_t>
struct DriftForceKernel {
  using acc_t = accumulate_t<scalar_t>;

  // task = (sample, chunk): log-sum-exp of the rows, statistics of the columns.
  static void normalisers(const DriftForces<scalar_t>& call, int64_t task, acc_t* memory);

  // task = sample: merges the chunks' column statistics.
  static void merge_columns(const DriftForces<scalar_t>& call, int64_t task);

  // task = (sample, block): forces of all temperatures and their squares.
  static void force(const DriftForces<scalar_t>& call, int64_t task, acc_t* memory);

  // task = (sample, piece): a piece of the sum, and its squares.
  static void sum(const DriftSum<acc_t>& call, int64_t task);
};

// Many small problems: one task is one problem, and all of it stays in a core's cache.

// N x M values of a small problem are at most this many.
constexpr int64_t kSmallElements = 1 << 16;
// Below this many problems, dealing out blocks of each keeps more threads busy.
constexpr int64_t kManyProblems = 16;

constexpr int64_t kGramPoints = 512;
// Larger results would not stay in the caches until they are read.
constexpr int64_t kCachedBytes = 1 << 23;

// Whether it pays to find the distances in the inner products of all points, of which symmetry
// saves close to half, and the squares of T forces in quadratic forms of them. A product that waits
// in memory costs as much as 32 multiplications.
inline bool kept_gram_pays(int64_t rows, int64_t points, int64_t features, int64_t temperatures) {
  const int64_t saved = (1 + temperatures) * rows * features;
  return points <= kGramPoints && temperatures > 0 &&
         20 * saved > points * (12 * features + 13 * temperatures * rows + 20 * 32);
}

// Squared norms and inner products of the points of one problem.
template <typename T>
constexpr int64_t gram_size(int64_t points) {
  return panel_padded<T>(points) * (panel_padded<T>(points) + 1);
}

template <typename scalar_t>
struct DriftBatch : DriftPoints<scalar_t> {
  using acc_t = accumulate_t<scalar_t>;
  acc_t* distances = nullptr;           // [B, N, M] to be kept, or null
  acc_t* grams = nullptr;               // [B, gram_size()]: weighted_distance() leaves them
                                        // to squares(); or null
  const acc_t* kept = nullptr;          // [B, N, M] or null
  acc_t scale = 0;                      // global mean distance
  const acc_t* temperatures = nullptr;  // [T]
  int64_t temperature_count = 0;
  acc_t* balances = nullptr;       // [B, T, 3 N + M]: squares() leaves them to combine()
  const acc_t* factors = nullptr;  // [T]: of the temperatures in the sum
  acc_t* force = nullptr;          // [B, N, S]
  double* squares = nullptr;       // [B, T]; combine: [B], of the sum

  // Whether results of so many columns for every generated sample go past the caches.
  bool streams(int64_t columns) const {
    const int64_t size = this->batch * this->generated * columns;
    return size * static_cast<int64_t>(sizeof(acc_t)) > kCachedBytes;
  }
};

template <Isa isa, typename scalar_t>
struct DriftBatchKernel {
  using acc_t = accumulate_t<scalar_t>;

  // Elements of scratch for each of the functions below, of which task = problem.
  static int64_t scratch(const DriftBatch<scalar_t>& call);

  // Keeps the distances if asked to; returns sum_ij d_ij w_j.
  static double weighted_distance(const DriftBatch<scalar_t>& call, int64_t b, acc_t* memory);

  // Sums of squares of the forces of every temperature, and their balances.
  static void squares(const DriftBatch<scalar_t>& call, int64_t b, acc_t* memory);

  // The forces of all temperatures times their factors, summed: one product. Takes the balances,
  // gives the sum of squares.
  static void combine(const DriftBatch<scalar_t>& call, int64_t b, acc_t* memory);
};

}  // namespace driftar::cpu
