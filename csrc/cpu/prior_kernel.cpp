#include "prior.h"

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

namespace driftar::cpu {

namespace {

template <typename T>
using Vector = at::vec::Vectorized<T>;

// Entropies are mapped in blocks of this many, which stay in the first-level cache.
constexpr int64_t kBlock = 512;

// Sigma of one vector of entropies; NaN stays NaN.
template <typename T>
Vector<T> sigma_of(const SigmaMap& map, Vector<T> entropy) {
  const Vector<T> zero(T(0)), limit(static_cast<T>(map.sigma_max));
  const auto inside = at::vec::clamp(entropy, zero, Vector<T>(static_cast<T>(map.entropy_max)));
  const auto growth = (inside / Vector<T>(static_cast<T>(map.tau))).expm1();
  return at::vec::clamp(limit * growth / Vector<T>(static_cast<T>(map.range)), zero, limit);
}

// d sigma / d E of one vector of entropies, 0 where E is clamped.
template <typename T>
Vector<T> slope_of(const SigmaMap& map, Vector<T> entropy) {
  const Vector<T> zero(T(0)), factor(static_cast<T>(map.sigma_max / (map.tau * map.range)));
  const auto slope = factor * (entropy / Vector<T>(static_cast<T>(map.tau))).exp();
  const auto inside = (entropy >= zero) & (entropy <= Vector<T>(static_cast<T>(map.entropy_max)));
  return Vector<T>::blendv(zero, slope, inside);
}

// out = map(in) for up to kBlock values of any dtype.
template <typename T, typename scalar_t, typename Map>
void map_block(const scalar_t* in, int64_t count, T* out, const Map& map) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(in[i]);
  constexpr int64_t lanes = Vector<T>::size();
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t filled = std::min(lanes, count - i);
    map(Vector<T>::loadu(out + i, filled)).store(out + i, filled);
  }
}

}  // namespace

template <Isa isa, typename scalar_t>
void PriorKernel<isa, scalar_t>::sigma(const SigmaMap& map, const scalar_t* entropy, int64_t begin,
                                       int64_t end, acc_t* sigma) {
  for (int64_t i = begin; i < end; i += kBlock) {
    map_block(entropy + i, std::min(kBlock, end - i), sigma + i,
              [&](Vector<acc_t> x) { return sigma_of(map, x); });
  }
}

template <Isa isa, typename scalar_t>
void PriorKernel<isa, scalar_t>::sigma_backward(const SigmaMap& map, const acc_t* grad,
                                                const scalar_t* entropy, int64_t begin, int64_t end,
                                                scalar_t* grad_entropy) {
  acc_t slope[kBlock];
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    map_block(entropy + start, count, slope, [&](Vector<acc_t> x) { return slope_of(map, x); });
    for (int64_t i = 0; i < count; ++i) {
      grad_entropy[start + i] = static_cast<scalar_t>(grad[start + i] * slope[i]);
    }
  }
}

template <Isa isa, typename scalar_t>
void PriorKernel<isa, scalar_t>::sample(const PriorCall<scalar_t>& call, int64_t begin,
                                        int64_t end) {
  acc_t sigma[kBlock];
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t rows = std::min(kBlock, end - start);
    map_block(call.entropy + start, rows, sigma,
              [&](Vector<acc_t> x) { return sigma_of(call.map, x); });
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t offset = (start + row) * call.width;
      const scalar_t *mean = call.mean + offset, *noise = call.noise + offset;
      scalar_t* out = call.out + offset;
      const acc_t scale = sigma[row];
#pragma omp simd
      for (int64_t c = 0; c < call.width; ++c) {
        out[c] = static_cast<scalar_t>(static_cast<acc_t>(mean[c]) +
                                       scale * static_cast<acc_t>(noise[c]));
      }
    }
  }
}

template <Isa isa, typename scalar_t>
void PriorKernel<isa, scalar_t>::sample_backward(const PriorBackwardCall<scalar_t>& call,
                                                 int64_t begin, int64_t end) {
  acc_t sigma[kBlock], slope[kBlock];
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t rows = std::min(kBlock, end - start);
    const acc_t* entropy = call.entropy + start;
    if (call.grad_noise != nullptr) {
      map_block(entropy, rows, sigma, [&](Vector<acc_t> x) { return sigma_of(call.map, x); });
    }
    if (call.grad_entropy != nullptr) {
      map_block(entropy, rows, slope, [&](Vector<acc_t> x) { return slope_of(call.map, x); });
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t offset = (start + row) * call.width;
      const scalar_t *grad = call.grad + offset, *noise = call.noise + offset;
      if (call.grad_entropy != nullptr) {
        acc_t product = 0;
#pragma omp simd reduction(+ : product)
        for (int64_t c = 0; c < call.width; ++c) {
          product += static_cast<acc_t>(grad[c]) * static_cast<acc_t>(noise[c]);
        }
        call.grad_entropy[start + row] = product * slope[row];
      }
      if (call.grad_noise != nullptr) {
        scalar_t* out = call.grad_noise + offset;
#pragma omp simd
        for (int64_t c = 0; c < call.width; ++c) {
          out[c] = static_cast<scalar_t>(static_cast<acc_t>(grad[c]) * sigma[row]);
        }
      }
    }
  }
}

template struct PriorKernel<Isa::DRIFTAR_ISA, float>;
template struct PriorKernel<Isa::DRIFTAR_ISA, double>;
template struct PriorKernel<Isa::DRIFTAR_ISA, c10::BFloat16>;
template struct PriorKernel<Isa::DRIFTAR_ISA, c10::Half>;

}  // namespace driftar::cpu
