#pragma once

// The three numbers that a row of scores s keeps while its keys stream by:
//   m = max s,   l = sum exp(s - m),   t = sum exp(s - m) (s - m)
// They merge like the pair (m, l) of online softmax, and give
//   lse = m + log l,   H = -sum p log p = log l - t / l >= 0.
// An empty row has m = -inf, l = t = 0. NaN propagates through all of them.
//
// The unnamed namespace keeps the copies of differently compiled kernel files apart.

#include "host_device.h"

#include <cmath>
#include <limits>

namespace driftar {
namespace {

template <typename T>
struct SoftmaxStatistics {
  T maximum = -std::numeric_limits<T>::infinity();
  T total = 0;
  T moment = 0;

  // The larger of two maxima; NaN wins.
  DRIFTAR_HOST_DEVICE static T larger(T a, T b) { return (a != a || a > b) ? a : b; }

  // What to subtract from scores whose maximum is m: m itself, but 0 for a row that is still empty.
  DRIFTAR_HOST_DEVICE static T shift(T m) {
    return m == -std::numeric_limits<T>::infinity() ? T(0) : m;
  }

  DRIFTAR_HOST_DEVICE bool empty() const { return maximum == -std::numeric_limits<T>::infinity(); }

  // Re-expresses total and moment relative to a new, not smaller maximum; returns the factor that
  // sums weighted by exp(s - m), such as the output row, must be multiplied with.
  DRIFTAR_HOST_DEVICE T raise(T new_maximum) {
    if (empty()) {
      maximum = new_maximum;
      return T(0);
    }
    const T difference = maximum - new_maximum;
    const T factor = std::exp(difference);
    // exp(x) x -> 0 as x -> -inf, where the product would be 0 * inf.
    const T moved = factor == T(0) ? T(0) : factor * difference;
    moment = factor * moment + moved * total;
    total *= factor;
    maximum = new_maximum;
    return factor;
  }

  DRIFTAR_HOST_DEVICE void add(T block_total, T block_moment) {
    total += block_total;
    moment += block_moment;
  }

  DRIFTAR_HOST_DEVICE T lse() const { return empty() ? maximum : maximum + std::log(total); }

  // Natural units; 0 for an empty row and exactly 0 for a single key.
  DRIFTAR_HOST_DEVICE T entropy() const {
    return empty() ? T(0) : std::log(total) - moment / total;
  }
};

}  // namespace
}  // namespace driftar
