#pragma once

#include <cmath>

namespace driftar {

// sigma(E) = sigma_max (exp(E / tau) - 1) / range, range = exp(entropy_max / tau) - 1
struct SigmaMap {
  double sigma_max, tau, entropy_max, range;

  SigmaMap(double sigma_max, double tau, double entropy_max)
      : sigma_max(sigma_max), tau(tau), entropy_max(entropy_max) {
    range = std::expm1(entropy_max / tau);
    if (std::abs(range) < 1e-8) range = 1e-8;
  }
};

}  // namespace driftar
