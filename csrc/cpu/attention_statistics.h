#pragma once

// What becomes of the statistics of a row. Only for kernel files.

#include "attention_tile.h"

#include <cmath>

namespace driftar::cpu {
namespace {

// |E_i| without a mask: visible keys from entropy_from on.
template <typename scalar_t>
int64_t support_size(const AttentionShape<scalar_t>& shape, int64_t b, int64_t i) {
  const Visibility& v = shape.visibility;
  const int64_t from = shape.entropy_from;
  if (v.ancestors == nullptr) return std::max<int64_t>(visible_end(shape, b, i) - from, 0);
  const int64_t prefix = v.key_length[b];
  const uint64_t* related = ancestor_row(shape, b, i);
  int64_t count = std::max<int64_t>(prefix - from, 0);
  for (int64_t node = std::max<int64_t>(from - prefix, 0); node <= i; ++node) {
    count += is_ancestor(related, node);
  }
  return count;
}

template <typename acc_t>
int64_t count_visible(const acc_t* row, int64_t columns) {
  int32_t count = 0;  // as wide as fp32, which vectors like
#pragma omp simd reduction(+ : count)
  for (int32_t c = 0; c < static_cast<int32_t>(columns); ++c) count += row[c] != kHidden<acc_t>;
  return count;
}

template <typename acc_t>
acc_t entropy_norm(int64_t support, bool normalize) {
  if (support <= 1) return acc_t(0);
  return normalize ? acc_t(1) / std::log(static_cast<acc_t>(support)) : acc_t(1);
}

// What is stored of a row; the last four of E, which holds `size` keys.
template <typename T>
struct RowResult {
  T maximum, lse, inverse;  // inverse: of the sum of exponentials, 0 for an empty row
  T entropy_lse, entropy, size, norm;
};

template <typename T>
RowResult<T> row_result(const SoftmaxStatistics<T>& all, const SoftmaxStatistics<T>& in_entropy,
                        int64_t size, bool normalize) {
  return {all.maximum,
          all.lse(),
          all.empty() ? T(0) : T(1) / all.total,
          in_entropy.lse(),
          in_entropy.entropy(),
          static_cast<T>(size),
          entropy_norm<T>(size, normalize)};
}

// Writes the statistics of row r of a block.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void store_statistics(const AttentionForward<scalar_t>& call, const QueryBlock<scalar_t>& block,
                      int64_t r, const RowResult<acc_t>& row) {
  const int64_t i = block.index(r);
  call.lse[i] = row.lse;
  call.max_score[i] = row.maximum;
  if (call.entropy == EntropyKind::none) return;
  call.entropy_lse[i] = row.entropy_lse;
  if (call.entropy == EntropyKind::map) {
    call.entropy_cross[i] = row.size;
    return;
  }
  call.entropy_norm[i] = row.norm;
  call.entropy_cross[i] = -row.entropy;
  call.entropy_out[i] = row.entropy * row.norm;
}

}  // namespace
}  // namespace driftar::cpu
