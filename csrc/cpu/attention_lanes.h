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

// SoftmaxStatistics of a block's queries, with exponentials of score - shift. The shift is a
// maximum of earlier keys, which follows the maximum only where that has risen by kSlackBits: what
// was summed so far is hardly ever shrunk, and no exponential exceeds 2^kSlackBits. Scores are in
// units of `unit`, which is positive, and moments in bits.
template <typename T>
struct LaneStatistics {
  static constexpr T kSlackBits = T(8);

  T unit;
  int64_t lanes;  // rows in whole groups
  T *maximum, *shift, *total, *moment;
  T* factor;  // by which the last rise shrank what came before

  LaneStatistics(T score_unit, int64_t rows, Scratch<T>& scratch)
      : unit(score_unit),
        lanes(whole_groups<T>(rows)),
        maximum(scratch.take(5 * lanes)),
        shift(maximum + lanes),
        total(shift + lanes),
        moment(total + lanes),
        factor(moment + lanes) {
    std::fill_n(maximum, 2 * lanes, kHidden<T>);
    std::fill_n(total, 2 * lanes, T(0));
  }

  void copy(const LaneStatistics& other) { std::copy_n(other.maximum, 5 * lanes, maximum); }
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
      const V mean = V(kLog2<T>) * V::loadu(in_entropy.moment + first + lane) / total;
      // Rounding may leave less than nothing.
      const V nats = at::vec::clamp_min(total.log() - mean, zero);
      V::blendv(nats, zero, V::loadu(entropy_inverse + lane) == zero).store(entropy + lane);
      const V support = V::loadu(size + lane);
      V::blendv(normalize ? one / support.log() : one, zero, support <= one).store(norm + lane);
    }
  }

  // Writes the statistics of `count` rows of a block from `first` on.
  template <typename scalar_t>
  void store(const AttentionForward<scalar_t>& call, const QueryBlock<scalar_t>& block,
             int64_t first, int64_t count) const {
    const int64_t i = block.index(first);  // the others follow, of several heads too
    std::copy_n(lse, count, call.lse + i);
    std::copy_n(maximum, count, call.max_score + i);
    if (call.entropy == EntropyKind::none) return;
    std::copy_n(entropy_lse, count, call.entropy_lse + i);
    if (call.entropy == EntropyKind::map) {
      // Support per head, for the average of the heads to reduce.
      std::copy_n(size, count, call.entropy_cross + i);
      return;
    }
    std::copy_n(norm, count, call.entropy_norm + i);
    for (int64_t r = 0; r < count; ++r) {
      call.entropy_cross[i + r] = -entropy[r];
      call.entropy_out[i + r] = entropy[r] * norm[r];
    }
  }

 private:
  static void finish(const LaneStatistics<T>& statistics, int64_t lane, T* maximum, T* lse,
                     T* inverse) {
    using V = Vector<T>;
    const V none(kHidden<T>), infinity(std::numeric_limits<T>::infinity());
    const V total = V::loadu(statistics.total + lane);
    V largest = V(statistics.unit) * V::loadu(statistics.maximum + lane);
    // A NaN among the scores reached only the sums.
    largest = V::blendv(total, largest, (total == total) | (largest == infinity));
    largest.store(maximum);
    const V shift = V(statistics.unit) * V::loadu(statistics.shift + lane);
    V::blendv(shift + total.log(), none, largest == none).store(lse);
    V::blendv(V(T(1)) / total, V(T(0)), largest == none).store(inverse);
  }
};

// Lane-wise maxima of `keys` rows of scores, kGroup apart. NaN may be passed over, since the sums
// will show it.
template <int64_t VECTORS, typename T>
void column_maxima(const T* scores, int64_t keys, Vector<T> (&best)[VECTORS]) {
  using V = Vector<T>;
  V other[VECTORS];  // every second key, since each maximum waits for the one before
  for (int64_t v = 0; v < VECTORS; ++v) best[v] = other[v] = V(kHidden<T>);
  const auto larger = [](V a, V b) { return at::vec::clamp_min(a, b); };  // one instruction
  int64_t j = 0;
  for (; j + 2 <= keys; j += 2) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < VECTORS; ++v) {
      const T* own = scores + j * kGroup<T> + v * V::size();
      best[v] = larger(best[v], V::loadu(own));
      other[v] = larger(other[v], V::loadu(own + kGroup<T>));
    }
  }
  for (int64_t v = 0; v < VECTORS; ++v) {
    if (j < keys) best[v] = larger(best[v], V::loadu(scores + j * kGroup<T> + v * V::size()));
    best[v] = larger(best[v], other[v]);
  }
}

// Whether each maximum of a vector of queries is in reach of its shift.
template <typename T>
Vector<T> in_reach(const LaneStatistics<T>& statistics, int64_t lane) {
  using V = Vector<T>;
  const V slack(statistics.kSlackBits / (statistics.unit * kLog2E<T>));
  return V::loadu(statistics.maximum + lane) <= V::loadu(statistics.shift + lane) + slack;
}

// Lets the shifts of a vector of queries follow their maxima where these are out of reach; sets
// their factors.
template <typename T>
void raise_shifts(const LaneStatistics<T>& statistics, int64_t lane) {
  using V = Vector<T>;
  const V none(kHidden<T>), zero(T(0));
  const V before = V::loadu(statistics.shift + lane);
  const V after =
      V::blendv(V::loadu(statistics.maximum + lane), before, in_reach(statistics, lane));
  const V difference = (before - after) * V(statistics.unit * kLog2E<T>);
  const V factor = V::blendv(power_of_two(difference), zero, before == none);
  const V moved = V::blendv(factor * difference, zero, factor == zero);
  const V total = V::loadu(statistics.total + lane);
  const V moment = factor * V::loadu(statistics.moment + lane);
  at::vec::fmadd(moved, total, moment).store(statistics.moment + lane);
  (factor * total).store(statistics.total + lane);
  factor.store(statistics.factor + lane);
  after.store(statistics.shift + lane);
}

// Stores exponentials in place of the scores.
template <typename T>
struct StoreExact {
  T* target;

  template <int64_t KEYS, int64_t VECTORS>
  void operator()(int64_t key, int64_t count, const Vector<T> (&e)[KEYS][VECTORS]) const {
#pragma GCC unroll 4
    for (int64_t k = 0; k < KEYS; ++k) {
      if (k >= count) return;
#pragma GCC unroll 2
      for (int64_t v = 0; v < VECTORS; ++v) {
        e[k][v].store(target + (key + k) * kGroup<T> + v * Vector<T>::size());
      }
    }
  }
};

// Takes in exp(score - shift) of a group, and hands it to store(key, count, exponentials) a few
// keys at a time; moments only where asked for. The difference is taken before the unit multiplies
// it, which keeps that of equal scores 0.
template <int64_t VECTORS, bool MOMENTS, typename T, typename Store>
void absorb_columns(const LaneStatistics<T>& statistics, int64_t lane, const T* scores,
                    int64_t keys, const Store& store) {
  using V = Vector<T>;
  constexpr int64_t together = 4 / VECTORS;  // keys
  const V none(kHidden<T>), least(std::numeric_limits<T>::lowest());
  const V bits(statistics.unit * kLog2E<T>);
  V shift[VECTORS], totals[together][VECTORS], moments[together][VECTORS];
  for (int64_t v = 0; v < VECTORS; ++v) {
    shift[v] = V::loadu(statistics.shift + lane + v * V::size());
    shift[v] = V::blendv(shift[v], V(T(0)), shift[v] == none);
    for (int64_t k = 0; k < together; ++k) totals[k][v] = moments[k][v] = V(T(0));
  }
  V e[together][VECTORS];
  const auto take = [&](int64_t j, int64_t k) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < VECTORS; ++v) {
      const T* own = scores + (j + k) * kGroup<T> + v * V::size();
      const V exponent = (V::loadu(own) - shift[v]) * bits;
      e[k][v] = power_of_two(exponent);
      totals[k][v] = totals[k][v] + e[k][v];
      if constexpr (MOMENTS) {
        // Clamped, which keeps 0 * -inf out.
        moments[k][v] = at::vec::fmadd(e[k][v], at::vec::clamp_min(exponent, least), moments[k][v]);
      }
    }
  };
  int64_t j = 0;
  for (; j + together <= keys; j += together) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < together; ++k) take(j, k);
    store(j, together, e);
  }
  if (j < keys) {
    for (int64_t k = 0; k < keys - j; ++k) take(j, k);
    store(j, keys - j, e);
  }
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

// Takes a group's scores of one tile through the softmax and hands their exponentials to `store`.
// Where a maximum rises, shrink(factors) lets what was summed with earlier ones follow.
template <int64_t VECTORS, typename T, typename Shrink, typename Store>
void softmax_columns(const LaneStatistics<T>& statistics, int64_t lane, const T* scores,
                     int64_t keys, bool moments, const Shrink& shrink, const Store& store) {
  using V = Vector<T>;
  V best[VECTORS];
  column_maxima<VECTORS>(scores, keys, best);
  bool rises = false;
  for (int64_t v = 0; v < VECTORS; ++v) {
    T* maximum = statistics.maximum + lane + v * V::size();
    at::vec::clamp_min(V::loadu(maximum), best[v]).store(maximum);
    rises |= in_reach(statistics, lane + v * V::size()).zero_mask() != 0;
  }
  if (rises) {
    for (int64_t v = 0; v < VECTORS; ++v) raise_shifts(statistics, lane + v * V::size());
    shrink(statistics.factor + lane);
  }
  moments ? absorb_columns<VECTORS, true>(statistics, lane, scores, keys, store)
          : absorb_columns<VECTORS, false>(statistics, lane, scores, keys, store);
}

}  // namespace
}  // namespace driftar::cpu
