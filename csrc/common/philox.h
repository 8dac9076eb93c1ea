#pragma once

// Philox4x32-10 (Salmon et al., SC 2011): random numbers as a function of (seed, stream, index), so
// that one seed drawn from PyTorch's generator gives every sample of a batch a stream of its own on
// any device.

#include "host_device.h"

#include <cmath>
#include <cstdint>

namespace driftar {
namespace {

class Philox {
 public:
  // As if `drawn` uniform numbers had been taken already.
  DRIFTAR_HOST_DEVICE Philox(uint64_t seed, uint64_t stream, uint64_t drawn = 0)
      : seed_(seed), stream_(stream), drawn_(drawn) {
    if (drawn % 2 == 1) refill();
  }

  // Uniform numbers taken so far; a normal one takes two.
  DRIFTAR_HOST_DEVICE uint64_t drawn() const { return drawn_; }

  // In [0, 1), 53 bits: half a block of the generator.
  DRIFTAR_HOST_DEVICE double uniform() {
    const bool second = drawn_ % 2 == 1;
    if (!second) refill();
    ++drawn_;
    const uint64_t high = second ? output_[2] : output_[0];
    const uint64_t low = second ? output_[3] : output_[1];
    return static_cast<double>(((high << 32) | low) >> 11) * 0x1.0p-53;
  }

  // Standard normal, by Box and Muller.
  DRIFTAR_HOST_DEVICE double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
#if defined(__CUDA_ARCH__)
    return radius * cospi(2.0 * uniform());  // spares the reduction of large arguments
#else
    return radius * std::cos(6.283185307179586 * uniform());
#endif
  }

  // Chi-squared with `freedom` degrees of freedom, by Marsaglia and Tsang (2000).
  DRIFTAR_HOST_DEVICE double chi_squared(int64_t freedom) {
    if (freedom <= 0) return 0.0;
    if (freedom == 1) {
      const double z = normal();
      return z * z;
    }
    const double d = 0.5 * static_cast<double>(freedom) - 1.0 / 3.0;
    const double c = 1.0 / std::sqrt(9.0 * d);
    for (;;) {
      const double x = normal();
      const double root = 1.0 + c * x;
      if (root <= 0.0) continue;
      const double v = root * root * root;
      if (std::log(1.0 - uniform()) < 0.5 * x * x + d - d * v + d * std::log(v)) return 2.0 * d * v;
    }
  }

 private:
  DRIFTAR_HOST_DEVICE void refill() {
    const uint64_t block = drawn_ / 2;
    uint32_t counter[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                           static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)};
    uint32_t key[2] = {static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32)};
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = uint64_t{0xD2511F53} * counter[0];
      const uint64_t second = uint64_t{0xCD9E8D57} * counter[2];
      const uint32_t mixed[4] = {
          static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(second),
          static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(first)};
      for (int word = 0; word < 4; ++word) counter[word] = mixed[word];
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
    for (int word = 0; word < 4; ++word) output_[word] = counter[word];
  }

  uint64_t seed_, stream_, drawn_;
  uint32_t output_[4] = {};
};

}  // namespace
}  // namespace driftar
