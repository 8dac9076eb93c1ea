// Lossless verification of chains of Gaussians (docs/ops/tree.md): a warp holds a chain. Its random
// numbers are those of the CPU kernel, number n of stream b being a function of (seed, b, n).

#include "tree.h"

#include "../common/philox.h"
#include "launch.cuh"
#include "numbers.cuh"
#include "reduce.cuh"

namespace driftar::cuda {

namespace {

constexpr int kChains = 4;  // of a block

// An isotropic Gaussian in D dimensions.
template <typename T>
struct Gaussian {
  const T* mean;
  double std;
};

__device__ __forceinline__ bool is_usable(double std) { return std >= 0 && std < INFINITY; }

__device__ __forceinline__ bool is_finite(float x) { return x - x == 0.0f; }

// What the acceptance of a position depends on; the same in all lanes.
struct Comparison {
  double twice_ratio;  // of the log densities, without their constant
  bool usable;         // finite
  bool same_point;     // draft and both means are equal
};

template <typename T>
__device__ Comparison compare(const T* draft, const Gaussian<T>& p, const Gaussian<T>& q,
                              int64_t width, int lane) {
  const double per_q = 1 / q.std, per_p = 1 / p.std;
  double sum = 0;
  bool usable = is_usable(p.std) && is_usable(q.std), same_point = true;
  for (int64_t d = lane; d < width; d += kWarp) {
    const float x = widen(draft[d]), p_mean = widen(p.mean[d]), q_mean = widen(q.mean[d]);
    // Log densities are subtracted per dimension.
    const double from_q = (static_cast<double>(x) - q_mean) * per_q;
    const double from_p = (static_cast<double>(x) - p_mean) * per_p;
    sum += (from_q - from_p) * (from_q + from_p);
    usable = usable && is_finite(x) && is_finite(p_mean) && is_finite(q_mean);
    same_point = same_point && x == p_mean && q_mean == p_mean;
  }
  return {warp_sum(sum), !__any_sync(kWholeWarp, !usable), !__any_sync(kWholeWarp, !same_point)};
}

template <typename T>
__device__ void sample_gaussian(const Gaussian<T>& p, uint64_t seed, int64_t stream, uint64_t drawn,
                                int64_t width, int lane, float* out) {
  for (int64_t d = lane; d < width; d += kWarp) {
    Philox random(seed, stream, drawn + 2 * d);
    out[d] = static_cast<float>(widen(p.mean[d]) + p.std * random.normal());
  }
}

// Sample of (p - q)+, see sample_residual in csrc/cpu/tree_kernel.cpp. All lanes search with the
// same numbers; each then draws its own dimensions.
template <typename T>
__device__ void sample_residual(const Gaussian<T>& p, const Gaussian<T>& q, uint64_t seed,
                                int64_t stream, uint64_t drawn, int64_t width, int lane,
                                float* out) {
  const auto apart = [&](int64_t d) {
    return static_cast<double>(widen(p.mean[d])) - static_cast<double>(widen(q.mean[d]));
  };
  double squared = 0;
  for (int64_t d = lane; d < width; d += kWarp) squared += apart(d) * apart(d);
  const double distance = sqrt(warp_sum(squared));
  const double spread = p.std / q.std, constant = width * (log(q.std) - log(p.std));
  Philox search(seed, stream, drawn);
  double along = 0, across = 0;
  for (int64_t proposal = 0; proposal < kMaxProposals; ++proposal) {
    along = search.normal();
    across = search.chi_squared(width - 1);
    const double shifted = (distance + p.std * along) / q.std;
    const double ratio =
        0.5 * ((shifted - along) * (shifted + along) + (spread - 1) * (spread + 1) * across) +
        constant;
    if (search.uniform() < -expm1(-ratio)) break;
  }

  const uint64_t first = search.drawn();
  const auto direction = [&](int64_t d) {
    return distance > 0 ? apart(d) / distance : (d == 0 ? 1.0 : 0.0);
  };
  const auto noise = [&](int64_t d) { return Philox(seed, stream, first + 2 * d).normal(); };
  double component = 0, total = 0;
  for (int64_t d = lane; d < width; d += kWarp) {
    const double z = noise(d);
    component += z * direction(d);
    total += z * z;
  }
  component = warp_sum(component);
  const double remaining = warp_sum(total) - component * component;
  const double stretch = across > 0 && remaining > 0 ? sqrt(across / remaining) : 0.0;
  for (int64_t d = lane; d < width; d += kWarp) {
    const double unit = direction(d);
    const double z = along * unit + stretch * (noise(d) - component * unit);
    out[d] = static_cast<float>(widen(p.mean[d]) + p.std * z);
  }
}

template <typename T>
__global__ void __launch_bounds__(kChains* kWarp, 4) chain_kernel(const ChainCall call) {
  const int lane = threadIdx.x % kWarp;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kChains + threadIdx.x / kWarp;
  if (b >= call.batch) return;
  const int64_t width = call.width, count = call.count;
  const uint64_t seed = static_cast<uint64_t>(*call.seed);
  const auto gaussian = [&](const void* mean, const void* std, int64_t at) {
    return Gaussian<T>{static_cast<const T*>(mean) + at * width,
                       static_cast<double>(widen(static_cast<const T*>(std)[at]))};
  };
  float* out = call.next_sample + b * width;
  int64_t kept = 0;
  for (; kept < count; ++kept) {
    const int64_t at = b * count + kept;
    const T* draft = static_cast<const T*>(call.draft) + at * width;
    const Gaussian<T> q = gaussian(call.draft_mean, call.draft_std, at);
    const Gaussian<T> p = gaussian(call.target_mean, call.target_std, at + b);
    const Comparison found = compare(draft, p, q, width, lane);
    if (found.usable && p.std > 0 && q.std > 0) {
      const double ratio = 0.5 * found.twice_ratio + width * (log(q.std) - log(p.std));
      // Strictly less: a ratio that underflows to 0 is never accepted, nor is NaN.
      if (Philox(seed, b, kept).uniform() < exp(ratio > 0 ? 0.0 : ratio)) continue;
      sample_residual(p, q, seed, b, kept + 1, width, lane, out);
    } else {
      if (found.usable && p.std == 0 && q.std == 0 && found.same_point) continue;
      sample_gaussian(p, seed, b, kept + 1, width, lane, out);
    }
    break;
  }
  if (kept == count) {
    const Gaussian<T> p = gaussian(call.target_mean, call.target_std, b * (count + 1) + count);
    sample_gaussian(p, seed, b, count, width, lane, out);
  }
  if (lane == 0) call.length[b] = kept;
}

}  // namespace

cudaError_t launch_verify_chain(const ChainCall& call, cudaStream_t stream) {
  return dispatch(call.type, [&](auto tag) {
    return launch(chain_kernel<typename decltype(tag)::type>,
                  {blocks_of(call.batch, kChains), kChains * kWarp}, stream, call);
  });
}

}  // namespace driftar::cuda
