#pragma once

// The passes of the drifting field on tensors that were checked: what the operators, pass by pass
// or in one, are made of.

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

namespace driftar::cpu {

// gen [B, N, S], pos [B, P, S], neg [B, Q, S] and the contiguous weights [B, M] of all.
struct DriftTensors {
  const at::Tensor &gen, &pos;
  const std::optional<at::Tensor>& neg;
  at::Tensor weights;

  int64_t batch() const { return gen.size(0); }
  int64_t points() const { return weights.size(1); }
  // Many small problems are computed one by one, others in blocks.
  bool many_small() const;
};

struct DriftDistances {
  at::Tensor values;  // [B, N, M], or empty unless they are to be kept
  at::Tensor grams;   // [B, gram_size()], or empty
  double total;       // sum_ij d_ij w_j / N over the batch
};

// The inner products of many small problems are kept where they pay for the squares of the forces
// of so many temperatures.
DriftDistances weighted_distances(const DriftTensors& points, bool keep, int64_t temperatures);

// What the forces need besides the points.
struct DriftSetting {
  at::Tensor distances;  // contiguous [B, N, M], or empty
  double scale;
  at::ArrayRef<double> temperatures;
};

// Raw force of each temperature [T, B, N, S] and its sum of squares [T].
std::pair<at::Tensor, std::vector<double>> raw_forces(const DriftTensors& points,
                                                      const DriftSetting& setting);

// The sum of the raw forces times their factors [T], and the sum of its squares of every problem.
std::pair<at::Tensor, std::vector<double>> sum_forces(const at::Tensor& raw,
                                                      const std::vector<double>& factors);

// Of many small problems: the sums of the squares of the raw forces [T]. Fills in the balances.
std::vector<double> many_squares(const DriftTensors& points, const DriftSetting& setting,
                                 const at::Tensor& grams, const at::Tensor& balances);

// Of many small problems, from their balances: as sum_forces(raw_forces()).
std::pair<at::Tensor, std::vector<double>> many_forces(const DriftTensors& points,
                                                       const DriftSetting& setting,
                                                       const at::Tensor& balances,
                                                       const std::vector<double>& factors);

}  // namespace driftar::cpu
