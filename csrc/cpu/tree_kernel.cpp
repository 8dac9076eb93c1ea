#include "tree.h"

#include "../common/philox.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>

namespace driftar::cpu {

namespace {

template <typename scalar_t>
bool finite(const scalar_t* x, int64_t count) {
  for (int64_t d = 0; d < count; ++d) {
    if (!std::isfinite(static_cast<double>(x[d]))) return false;
  }
  return true;
}

template <typename scalar_t>
bool equal(const scalar_t* a, const scalar_t* b, int64_t count) {
  for (int64_t d = 0; d < count; ++d) {
    if (a[d] != b[d]) return false;
  }
  return true;
}

// An isotropic Gaussian in D dimensions.
template <typename scalar_t>
struct Gaussian {
  const scalar_t* mean;
  double std;
  bool usable(int64_t width) const { return std::isfinite(std) && std >= 0 && finite(mean, width); }
};

// log N(x; p) - log N(x; q), summed as differences per dimension.
template <typename scalar_t>
double log_ratio(const scalar_t* x, const Gaussian<scalar_t>& p, const Gaussian<scalar_t>& q,
                 int64_t width) {
  const double per_q = 1 / q.std, per_p = 1 / p.std;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) {
    const double value = static_cast<double>(x[d]);
    const double from_q = (value - static_cast<double>(q.mean[d])) * per_q;
    const double from_p = (value - static_cast<double>(p.mean[d])) * per_p;
    sum += (from_q - from_p) * (from_q + from_p);
  }
  return 0.5 * sum + width * (std::log(q.std) - std::log(p.std));
}

template <typename scalar_t>
void sample_gaussian(const Gaussian<scalar_t>& p, int64_t width, Philox& random, double* out) {
  for (int64_t d = 0; d < width; ++d) {
    out[d] = static_cast<double>(p.mean[d]) + p.std * random.normal();
  }
}

// Sample of (p - q)+, by proposing from p and keeping with probability 1 - min(1, q / p). The
// densities depend on x = mean_p + std_p (a e + z), e along mean_p - mean_q and z orthogonal to it,
// only through a and |z|^2, so that a proposal costs two random numbers whatever the dimension.
template <typename scalar_t>
void sample_residual(const Gaussian<scalar_t>& p, const Gaussian<scalar_t>& q, int64_t width,
                     Philox& random, double* out) {
  const auto apart = [&](int64_t d) {
    return static_cast<double>(p.mean[d]) - static_cast<double>(q.mean[d]);
  };
  double squared = 0;
  for (int64_t d = 0; d < width; ++d) squared += apart(d) * apart(d);
  const double distance = std::sqrt(squared);
  const double constant = width * (std::log(q.std) - std::log(p.std));
  double along = 0, across = 0;
  for (int64_t proposal = 0; proposal < kMaxProposals; ++proposal) {
    along = random.normal();
    across = random.chi_squared(width - 1);
    const double shifted = (distance + p.std * along) / q.std, spread = p.std / q.std;
    const double ratio =
        0.5 * ((shifted - along) * (shifted + along) + (spread - 1) * (spread + 1) * across) +
        constant;
    if (random.uniform() < -std::expm1(-ratio)) break;
  }

  const auto direction = [&](int64_t d) {
    return distance > 0 ? apart(d) / distance : (d == 0 ? 1.0 : 0.0);
  };
  double component = 0, remaining = 0;
  for (int64_t d = 0; d < width; ++d) {
    out[d] = random.normal();
    component += out[d] * direction(d);
  }
  for (int64_t d = 0; d < width; ++d) {
    out[d] -= component * direction(d);
    remaining += out[d] * out[d];
  }
  const double stretch = across > 0 && remaining > 0 ? std::sqrt(across / remaining) : 0.0;
  for (int64_t d = 0; d < width; ++d) {
    out[d] = static_cast<double>(p.mean[d]) + p.std * (along * direction(d) + stretch * out[d]);
  }
}

// accepts(node) says whether a node whose ancestors live is accepted.
template <typename Accepts>
bool walk_sample(const WalkCall& call, int64_t b, int64_t* level, const Accepts& accepts) {
  const int64_t* parents = call.parents + b * call.parents_batch * call.nodes;
  // Levels count from 1 for a root; 0 marks a dead node.
  int64_t best = -1, length = 0;
  for (int64_t node = 0; node < call.nodes; ++node) {
    const int64_t parent = parents[node], above = parent < 0 ? 0 : level[parent];
    const bool lives = (parent < 0 || above > 0) && accepts(node);
    level[node] = lives ? above + 1 : 0;
    if (level[node] > length) {
      length = level[node];
      best = node;
    }
  }
  if (length > call.max_depth) return false;
  int64_t* path = call.path + b * call.max_depth;
  for (int64_t step = length; step < call.max_depth; ++step) path[step] = -1;
  call.length[b] = length;
  call.node[b] = best;
  for (int64_t step = length - 1; step >= 0; --step, best = parents[best]) path[step] = best;
  return true;
}

// ||a - b||^2; the squares of fp32 differences are exact in it.
template <typename scalar_t>
double squared_distance(const scalar_t* a, const scalar_t* b, int64_t count) {
  using acc_t = accumulate_t<scalar_t>;
  // Independent sums, since each addition waits for the one before.
  constexpr int64_t lanes = 32;
  double sums[lanes] = {};
  int64_t d = 0;
  for (; d + lanes <= count; d += lanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const acc_t difference = static_cast<acc_t>(a[d + lane]) - static_cast<acc_t>(b[d + lane]);
      sums[lane] += static_cast<double>(difference) * static_cast<double>(difference);
    }
  }
  double sum = 0;
  if (d > 0) {
#pragma omp simd reduction(+ : sum)
    for (int64_t lane = 0; lane < lanes; ++lane) sum += sums[lane];
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t rest = d; rest < count; ++rest) {
    const acc_t difference = static_cast<acc_t>(a[rest]) - static_cast<acc_t>(b[rest]);
    sum += static_cast<double>(difference) * static_cast<double>(difference);
  }
  return sum;
}

}  // namespace

template <Isa isa>
bool TreeKernel<isa>::walk(const WalkCall& call, int64_t b, int64_t* level) {
  const bool* accept = call.accept + b * call.nodes;
  return walk_sample(call, b, level, [&](int64_t node) { return accept[node]; });
}

template <Isa isa>
template <typename scalar_t>
bool TreeKernel<isa>::verify(const VerifyCall<scalar_t>& call, int64_t b, int64_t* level) {
  const int64_t first = b * call.walk.nodes;
  return walk_sample(call.walk, b, level, [&](int64_t node) {
    const int64_t at = (first + node) * call.width;
    const double squared = squared_distance(call.draft + at, call.target + at, call.width);
    // false for NaN
    return static_cast<accumulate_t<scalar_t>>(std::sqrt(squared)) <= call.tolerance;
  });
}

template <Isa isa>
template <typename scalar_t>
void TreeKernel<isa>::verify_chain(const ChainCall<scalar_t>& call, int64_t b) {
  const int64_t width = call.width, count = call.count;
  Philox random(call.seed, static_cast<uint64_t>(b));
  double* out = call.next_sample + b * width;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t at = b * count + k;
    const scalar_t* draft = call.draft + at * width;
    const Gaussian<scalar_t> q{call.draft_mean + at * width,
                               static_cast<double>(call.draft_std[at])};
    const Gaussian<scalar_t> p{call.target_mean + (at + b) * width,
                               static_cast<double>(call.target_std[at + b])};
    const double uniform = random.uniform();
    const bool usable = finite(draft, width) && q.usable(width) && p.usable(width);
    if (usable && p.std > 0 && q.std > 0) {
      // Strictly less: a ratio that underflows to 0 is never accepted.
      if (uniform < std::exp(std::fmin(log_ratio(draft, p, q, width), 0.0))) continue;
      sample_residual(p, q, width, random, out);
    } else {
      const bool same_point = usable && p.std == 0 && q.std == 0 && equal(p.mean, q.mean, width) &&
                              equal(draft, p.mean, width);
      if (same_point) continue;
      sample_gaussian(p, width, random, out);
    }
    call.length[b] = k;
    return;
  }
  const int64_t last = b * (count + 1) + count;
  const Gaussian<scalar_t> p{call.target_mean + last * width,
                             static_cast<double>(call.target_std[last])};
  sample_gaussian(p, width, random, out);
  call.length[b] = count;
}

template <Isa isa>
void TreeKernel<isa>::commit(const CommitCall& call, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / call.heads, h = index % call.heads;
    const int64_t* path = call.path + b * call.max_depth;
    std::byte* prefix_end =
        call.cache + b * call.batch + h * call.head + call.key_lengths[b] * call.row;
    for (int64_t step = 0; step < call.length[b]; ++step) {
      // Paths increase and path[step] >= step, so a row is read before anything is written over it.
      if (path[step] == step) continue;
      const std::byte* source = prefix_end + path[step] * call.row;
      std::byte* target = prefix_end + step * call.row;
      if (call.column == call.element) {
        std::memcpy(target, source, call.width * call.element);
        continue;
      }
      for (int64_t d = 0; d < call.width; ++d) {
        std::memcpy(target + d * call.column, source + d * call.column, call.element);
      }
    }
  }
}

constexpr Isa kIsa = Isa::DRIFTAR_ISA;
template struct TreeKernel<kIsa>;
template bool TreeKernel<kIsa>::verify(const VerifyCall<float>&, int64_t, int64_t*);
template bool TreeKernel<kIsa>::verify(const VerifyCall<double>&, int64_t, int64_t*);
template bool TreeKernel<kIsa>::verify(const VerifyCall<c10::BFloat16>&, int64_t, int64_t*);
template bool TreeKernel<kIsa>::verify(const VerifyCall<c10::Half>&, int64_t, int64_t*);
template void TreeKernel<kIsa>::verify_chain(const ChainCall<float>&, int64_t);
template void TreeKernel<kIsa>::verify_chain(const ChainCall<double>&, int64_t);
template void TreeKernel<kIsa>::verify_chain(const ChainCall<c10::BFloat16>&, int64_t);
template void TreeKernel<kIsa>::verify_chain(const ChainCall<c10::Half>&, int64_t);

}  // namespace driftar::cpu
