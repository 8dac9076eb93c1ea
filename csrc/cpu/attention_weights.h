#pragma once

// Exponentials of a group of queries on their way to the product with the values. Only for kernel
// files.

#include "attention_lanes.h"
#include "attention_operands.h"

namespace driftar::cpu {
namespace {

// Stores exponentials as elements E of the product: as they are, to `exact`.
template <typename E>
struct StoreWeights : StoreExact<E> {
  StoreWeights(E* exact, bool, E*) : StoreExact<E>{exact} {}
};

#if defined(__AVX512BF16__)
// Rounded, neighbouring keys in pairs, an odd one with zeros; to `exact` only with `keep`.
template <>
struct StoreWeights<Bf16Pair> {
  float* exact;
  bool keep;
  Bf16Pair* target;

  template <int64_t KEYS, int64_t VECTORS>
  void operator()(int64_t key, int64_t count, const Vector<float> (&e)[KEYS][VECTORS]) const {
    static_assert(KEYS % 2 == 0);
    if (keep) StoreExact<float>{exact}(key, count, e);
#pragma GCC unroll 2
    for (int64_t k = 0; k < KEYS; k += 2) {
      if (k >= count) return;
#pragma GCC unroll 2
      for (int64_t v = 0; v < VECTORS; ++v) {
        const __m512 odd = k + 1 < count ? __m512(e[k + 1][v]) : _mm512_setzero_ps();
        _mm512_storeu_si512(target + (key + k) / 2 * kGroup<float> + v * Vector<float>::size(),
                            rounded_pairs(e[k][v], odd));
      }
    }
  }
};
#endif

}  // namespace
}  // namespace driftar::cpu
