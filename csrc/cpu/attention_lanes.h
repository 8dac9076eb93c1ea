#pragma once

// Softmax of transposed scores: every query has a lane of its own, where its statistics gather, so
// that nothing is reduced across lanes. Only for kernel files.

#include "attention_statistics.h"

#include <algorithm>
#include <limits>

namespace driftar::cpu {
namespace {

// Queries of a group, two vectors of lanes.
template <typename T>
constexpr int64_t kGroup = kGemmColumns<T>;

template <typename T>
constexpr int64_t whole_groups(int64_t rows) {
  return (rows + kGroup<T> - 1) / kGroup<T> * kGroup<T>;
}

// SoftmaxStatistics of a block's queries, and the factor by which a tile shrank what came before.
template <typename T>
struct LaneStatistics {
  int64_t lanes;  // rows in whole groups
  T *maximum, *total, *moment, *factor;

  LaneStatistics(int64_t rows, Scratch<T>& scratch)
      : lanes(whole_groups<T>(rows)),
        maximum(scratch.take(4 * lanes)),
        total(maximum + lanes),
        moment(total + lanes),
        factor(moment + lanes) {
    std::fill_n(maximum, lanes, kHidden<T>);
    std::fill_n(total, 2 * lanes, T(0));
  }

  void copy(const LaneStatistics& other) { std::copy_n(other.maximum, 4 * lanes, maximum); }
};

// RowResult of a group of queries, a lane each.
template <typename T>
struct GroupResult {
  alignas(64) T maximum[kGroup<T>], lse[kGroup<T>], inverse[kGroup<T>];
  alignas(64) T entropy_lse[kGroup<T>], entropy[kGroup<T>], size[kGroup<T>], norm[kGroup<T>];
  alignas(64) T entropy_inverse[kGroup<T>];  // of the sum over E

  GroupResult(const LaneStatistics<T>& all, const LaneStatistics<T>& in_entropy, int64_t first,
              const int64_t* sizes, bool normalize) {
    using V = Vector<T>;
    const V zero(T(0)), one(T(1));
    std::copy_n(sizes, kGroup<T>, size);
    for (int64_t lane = 0; lane < kGroup<T>; lane += V::size()) {
      finish(all, first + lane, maximum + lane, lse + lane, inverse + lane);
      T entropy_maximum[V::size()];
      finish(in_entropy, first + lane, entropy_maximum, entropy_lse + lane, entropy_inverse + lane);
      const V total = V::loadu(in_entropy.total + first + lane);
      const V mean = V::loadu(in_entropy.moment + first + lane) / total;
      V::blendv(total.log() - mean, zero, V::loadu(entropy_inverse + lane) == zero)
          .store(entropy + lane);
      const V support = V::loadu(size + lane);
      V::blendv(normalize ? one / support.log() : one, zero, support <= one).store(norm + lane);
    }
  }

  RowResult<T> row(int64_t lane) const {
    return {maximum[lane], lse[lane],  inverse[lane], entropy_lse[lane],
            entropy[lane], size[lane], norm[lane]};
  }

 private:
  static void finish(const LaneStatistics<T>& statistics, int64_t lane, T* maximum, T* lse,
                     T* inverse) {
    using V = Vector<T>;
    const V none(kHidden<T>), largest = V::loadu(statistics.maximum + lane);
    const V total = V::loadu(statistics.total + lane);
    largest.store(maximum);
    V::blendv(largest + total.log(), none, largest == none).store(lse);
    V::blendv(V(T(1)) / total, V(T(0)), largest == none).store(inverse);
  }
};

// Lane-wise maxima of `keys` rows of scores, kGroup apart; NaN wins.
template <int64_t VECTORS, typename T>
void column_maxima(const T* scores, int64_t keys, Vector<T> (&best)[VECTORS]) {
  using V = Vector<T>;
  V other[VECTORS];  // every second key, since each maximum waits for the one before
  for (int64_t v = 0; v < VECTORS; ++v) best[v] = other[v] = V(kHidden<T>);
  int64_t j = 0;
  for (; j + 2 <= keys; j += 2) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < VECTORS; ++v) {
      const T* own = scores + j * kGroup<T> + v * V::size();
      best[v] = at::vec::maximum(best[v], V::loadu(own));
      other[v] = at::vec::maximum(other[v], V::loadu(own + kGroup<T>));
    }
  }
  for (int64_t v = 0; v < VECTORS; ++v) {
    if (j < keys) {
      best[v] = at::vec::maximum(best[v], V::loadu(scores + j * kGroup<T> + v * V::size()));
    }
    best[v] = at::vec::maximum(best[v], other[v]);
  }
}

// SoftmaxStatistics::raise for a vector of queries; sets their factors.
template <typename T>
void raise_maxima(const LaneStatistics<T>& statistics, int64_t lane, Vector<T> maximum) {
  using V = Vector<T>;
  const V none(kHidden<T>), zero(T(0));
  const V before = V::loadu(statistics.maximum + lane);
  const V difference = before - maximum;
  const V factor = V::blendv(exponential(difference), zero, before == none);
  const V moved = V::blendv(factor * difference, zero, factor == zero);
  const V total = V::loadu(statistics.total + lane);
  const V moment = factor * V::loadu(statistics.moment + lane);
  at::vec::fmadd(moved, total, moment).store(statistics.moment + lane);
  (factor * total).store(statistics.total + lane);
  factor.store(statistics.factor + lane);
  maximum.store(statistics.maximum + lane);
}

// Scores become exp(score - maximum), which the statistics take in; moments only where asked for.
template <int64_t VECTORS, bool MOMENTS, typename T>
void absorb_columns(const LaneStatistics<T>& statistics, int64_t lane, T* scores, int64_t keys) {
  using V = Vector<T>;
  constexpr int64_t together = 4 / VECTORS;  // keys
  const V none(kHidden<T>), least(std::numeric_limits<T>::lowest());
  V shift[VECTORS], totals[together][VECTORS], moments[together][VECTORS];
  for (int64_t v = 0; v < VECTORS; ++v) {
    const V maximum = V::loadu(statistics.maximum + lane + v * V::size());
    shift[v] = V::blendv(maximum, V(T(0)), maximum == none);
    for (int64_t k = 0; k < together; ++k) totals[k][v] = moments[k][v] = V(T(0));
  }
  const auto take = [&](int64_t j, int64_t k) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < VECTORS; ++v) {
      T* own = scores + j * kGroup<T> + v * V::size();
      const V exponent = V::loadu(own) - shift[v];
      const V e = exponential(exponent);
      totals[k][v] = totals[k][v] + e;
      if constexpr (MOMENTS) {
        // Clamped, which keeps 0 * -inf out.
        moments[k][v] = at::vec::fmadd(e, at::vec::clamp_min(exponent, least), moments[k][v]);
      }
      e.store(own);
    }
  };
  int64_t j = 0;
  for (; j + together <= keys; j += together) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < together; ++k) take(j + k, k);
  }
  for (; j < keys; ++j) take(j, 0);
  for (int64_t v = 0; v < VECTORS; ++v) {
    T* total = statistics.total + lane + v * V::size();
    T* moment = statistics.moment + lane + v * V::size();
    for (int64_t k = 1; k < together; ++k) {
      totals[0][v] = totals[0][v] + totals[k][v], moments[0][v] = moments[0][v] + moments[k][v];
    }
    (V::loadu(total) + totals[0][v]).store(total);
    (V::loadu(moment) + moments[0][v]).store(moment);
  }
}

// Takes a group's scores of one tile through the softmax; `out` [rows, out_stride], its sums of
// values so far, shrinks where a maximum rises.
template <int64_t VECTORS, typename T>
void softmax_columns(const LaneStatistics<T>& statistics, int64_t lane, int64_t rows, T* scores,
                     int64_t keys, bool moments, T* out, int64_t out_stride, int64_t out_width) {
  using V = Vector<T>;
  V best[VECTORS];
  column_maxima<VECTORS>(scores, keys, best);
  bool rises = false;
  for (int64_t v = 0; v < VECTORS; ++v) {
    rises |= (best[v] <= V::loadu(statistics.maximum + lane + v * V::size())).zero_mask() != 0;
  }
  if (rises) {
    for (int64_t v = 0; v < VECTORS; ++v) {
      const int64_t first = lane + v * V::size();
      raise_maxima(statistics, first,
                   at::vec::maximum(best[v], V::loadu(statistics.maximum + first)));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T factor = statistics.factor[lane + r];
      if (factor == T(1)) continue;
      T* row = out + r * out_stride;
      for (int64_t c = 0; c < out_width; c += V::size()) {
        (V::loadu(row + c) * V(factor)).store(row + c);
      }
    }
  }
  moments ? absorb_columns<VECTORS, true>(statistics, lane, scores, keys)
          : absorb_columns<VECTORS, false>(statistics, lane, scores, keys);
}

}  // namespace
}  // namespace driftar::cpu
