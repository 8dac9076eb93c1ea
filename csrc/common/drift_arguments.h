#pragma once

// What the drift operators ask of their arguments on every device.

#include "checks.h"

#include <vector>

namespace driftar {

inline int64_t drift_point_count(const at::Tensor& gen, const at::Tensor& pos,
                                 const std::optional<at::Tensor>& neg) {
  return gen.size(1) + pos.size(1) + (neg ? neg->size(1) : 0);
}

// gen [B, N, S], pos [B, P, S], neg [B, Q, S].
inline void check_drift_points(const char* op, const at::Tensor& gen, const at::Tensor& pos,
                               const std::optional<at::Tensor>& neg) {
  check_floating(op, "gen", gen);
  check_rank(op, "gen", gen, 3);
  TORCH_CHECK_VALUE(gen.numel() > 0, op, ": gen must not be empty, got shape ", gen.sizes());
  const auto check_part = [&](const char* name, const at::Tensor& x) {
    check_rank(op, name, x, 3);
    check_like(op, name, x, gen);
    check_shape(op, name, x, {gen.size(0), x.size(1), gen.size(2)});
  };
  check_part("pos", pos);
  if (neg) check_part("neg", *neg);
}

// The same with weight [B, N + Q + P].
inline void check_drift_points(const char* op, const at::Tensor& gen, const at::Tensor& pos,
                               const std::optional<at::Tensor>& neg, const at::Tensor& weight) {
  check_drift_points(op, gen, pos, neg);
  check_shape(op, "weight", weight, {gen.size(0), drift_point_count(gen, pos, neg)});
  check_statistic(op, "weight", weight, gen);
}

inline void check_temperatures(const char* op, at::ArrayRef<double> temperatures) {
  TORCH_CHECK_VALUE(!temperatures.empty(), op, ": temperatures must hold at least one value");
  for (const double temperature : temperatures) {
    TORCH_CHECK_VALUE(temperature > 0, op, ": temperatures must be > 0, got ", temperature);
  }
}

// What the force needs besides the points: distances [B, N, M] or none, scale a scalar.
inline void check_drift_statistics(const char* op, const at::Tensor& gen, const at::Tensor& weight,
                                   const at::Tensor& distances, const at::Tensor& scale,
                                   at::ArrayRef<double> temperatures) {
  check_temperatures(op, temperatures);
  TORCH_CHECK_VALUE(scale.numel() == 1, op, ": scale must be a scalar, got shape ", scale.sizes());
  check_statistic(op, "scale", scale, gen);
  if (distances.numel() == 0) return;
  check_shape(op, "distances", distances, {gen.size(0), gen.size(1), weight.size(1)});
  check_statistic(op, "distances", distances, gen);
}

// [B, T, 3 N + M]
inline std::vector<int64_t> balance_shape(const at::Tensor& gen, const at::Tensor& weight,
                                          at::ArrayRef<double> temperatures) {
  return {gen.size(0), static_cast<int64_t>(temperatures.size()), 3 * gen.size(1) + weight.size(1)};
}

// What the sum of the temperatures' forces needs besides: factors [T].
inline void check_drift_balances(const char* op, const at::Tensor& gen, const at::Tensor& weight,
                                 at::ArrayRef<double> temperatures, const at::Tensor& balances,
                                 const at::Tensor& factors) {
  check_shape(op, "balances", balances, balance_shape(gen, weight, temperatures));
  check_statistic(op, "balances", balances, gen);
  check_shape(op, "factors", factors, {static_cast<int64_t>(temperatures.size())});
  TORCH_CHECK_VALUE(factors.device() == gen.device(), op, ": factors must be on ", gen.device(),
                    ", got ", factors.device());
}

}  // namespace driftar
