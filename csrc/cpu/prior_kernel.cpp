#include "prior.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>

namespace driftar::cpu {

namespace {

// Comparisons are written so that a NaN entropy stays NaN.
template <typename T>
T sigma_of(const SigmaMap& map, T entropy) {
  const T top = static_cast<T>(map.entropy_max), limit = static_cast<T>(map.sigma_max);
  const T clamped = entropy < T(0) ? T(0) : entropy > top ? top : entropy;
  const T growth = std::expm1(clamped / static_cast<T>(map.tau));
  const T sigma = limit * growth / static_cast<T>(map.range);
  return sigma < T(0) ? T(0) : sigma > limit ? limit : sigma;
}

}  // namespace

template <Isa isa, typename scalar_t>
void PriorKernel<isa, scalar_t>::sigma(const SigmaMap& map, const scalar_t* entropy, int64_t begin,
                                       int64_t end, acc_t* sigma) {
  for (int64_t i = begin; i < end; ++i) sigma[i] = sigma_of(map, static_cast<acc_t>(entropy[i]));
}

template <Isa isa, typename scalar_t>
void PriorKernel<isa, scalar_t>::sample(const PriorCall<scalar_t>& call, int64_t begin,
                                        int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const acc_t sigma = sigma_of(call.map, call.entropy[row]);
    const scalar_t* mean = call.mean + row * call.width;
    const scalar_t* noise = call.noise + row * call.width;
    scalar_t* out = call.out + row * call.width;
    for (int64_t c = 0; c < call.width; ++c) {
      out[c] =
          static_cast<scalar_t>(static_cast<acc_t>(mean[c]) + sigma * static_cast<acc_t>(noise[c]));
    }
  }
}

template struct PriorKernel<Isa::DRIFTAR_ISA, float>;
template struct PriorKernel<Isa::DRIFTAR_ISA, double>;
template struct PriorKernel<Isa::DRIFTAR_ISA, c10::BFloat16>;
template struct PriorKernel<Isa::DRIFTAR_ISA, c10::Half>;

}  // namespace driftar::cpu
