#pragma once

// A tile of the backward pass: gradients of its scores, and the sums that they enter. Only for
// kernel files.

#include "attention_operands.h"

#include <cmath>
#include <tuple>

namespace driftar::cpu {
namespace {

// What the gradient of a row of scores needs: q = exp(s - shift), p = share q.
template <typename T>
struct RowGradient {
  T shift, share, delta, weight, cross;
};

// p = share q and dS = scale q (share (gradient - delta) - weight (logarithm - cross)), 0 where q
// is: selected, since the value of a hidden key, its logarithm and the share may be anything.
template <typename T>
void store_gradient(const RowGradient<T>& row, T scale, Vector<T> q, Vector<T> logarithm,
                    T* probabilities, T* gradient) {
  const Vector<T> share(row.share);
  const Vector<T> pull = share * (Vector<T>::loadu(gradient) - Vector<T>(row.delta));
  const Vector<T> bend = Vector<T>(row.weight) * (logarithm - Vector<T>(row.cross));
  const Vector<T> change = Vector<T>(scale) * q * (pull - bend);
  const Vector<T> zero(T(0)), hidden = q == zero;
  Vector<T>::blendv(change, zero, hidden).store(gradient);
  Vector<T>::blendv(share * q, zero, hidden).store(probabilities);
}

// scores -> p; gradient, which holds <grad_out, v>, -> scale dS.
template <typename T>
void head_gradient(const RowGradient<T>& row, T scale, int64_t count, T* scores, T* gradient) {
  const Vector<T> offset(row.shift);
  for (int64_t j = 0; j < count; j += Vector<T>::size()) {
    const Vector<T> exponent = Vector<T>::loadu(scores + j) - offset;
    store_gradient(row, scale, exponential(exponent), exponent, scores + j, gradient + j);
  }
}

// The same from q in place of the scores, and log pi.
template <typename T>
void map_gradient(const RowGradient<T>& row, T scale, int64_t count, const T* logarithms,
                  T* probabilities, T* gradient) {
  for (int64_t j = 0; j < count; j += Vector<T>::size()) {
    store_gradient(row, scale, Vector<T>::loadu(probabilities + j),
                   Vector<T>::loadu(logarithms + j), probabilities + j, gradient + j);
  }
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
RowGradient<acc_t> row_gradient(const AttentionBackward<scalar_t>& call,
                                const QueryBlock<scalar_t>& block, int64_t r, bool counted) {
  const int64_t i = block.index(r);
  const acc_t lse = call.lse[i];
  RowGradient<acc_t> row{lse, acc_t(1), call.delta[i], acc_t(0), acc_t(0)};
  if (counted && call.entropy_lse[i] != kHidden<acc_t>) {
    row.shift = call.entropy_lse[i];
    if (row.shift != lse) row.share = std::exp(row.shift - lse);  // all keys count, as a rule
    const bool map = call.entropy == EntropyKind::map;
    row.weight = map ? call.entropy_weight[block.b * call.query_length + block.query_of(r)] /
                           static_cast<acc_t>(call.query_heads)
                     : call.entropy_weight[i];
    row.cross = call.entropy_cross[i];
  }
  // A row with NaN among its visible scores stays NaN, but its hidden ones keep a q of 0.
  if (row.shift != row.shift) row.share = row.shift;
  row.shift = gradient_shift(row.shift);
  return row;
}

// Calls process(tile, counted) for every call.splits-th tile of keys, which lie on one side of
// entropy_from.
template <typename scalar_t, typename Process>
void for_each_key_tile(const AttentionBackward<scalar_t>& call, int64_t key_block, int64_t split,
                       Process&& process) {
  const bool wants_entropy = call.entropy != EntropyKind::none;
  const int64_t from = wants_entropy ? std::min(call.entropy_from, call.key_length) : 0;
  int64_t turn = 0;
  for (const auto& [first, last, counted] :
       {std::tuple{int64_t{0}, from, false}, std::tuple{from, call.key_length, wants_entropy}}) {
    for (int64_t column = first; column < last; column += key_block) {
      if (turn++ % call.splits != split) continue;
      process(Tile{column, std::min(key_block, last - column)}, counted);
    }
  }
}

// One key head's part of a tile: operands, and the gradients that gather.
template <typename scalar_t>
struct KeyTile {
  RightOperand<stored_type<scalar_t>, element_type<scalar_t>> keys;
  Panels<element_type<scalar_t>> packed_keys, packed_values;
  bool finite;  // keys
  accumulate_t<scalar_t>*grad_keys, *grad_values;
};

// target[j, :] += sum_i coefficients[i, j] rows[i, :], for tiles of a block whose first rows may
// see fewer keys: row i meets the keys below seen[i].
template <typename T, typename E, typename stored_t>
void accumulate_transposed(int64_t keys, int64_t width, int64_t queries, const int64_t* seen,
                           const Coefficients<T, E>& coefficients,
                           const RightOperand<stored_t, E>& rows, bool guarded, T* target,
                           int64_t target_stride) {
  static_assert(kGemmRows<T> % Elements<E>::numbers == 0);  // strips, whose rows see the same
  int64_t first = 0;
  for (int64_t key = 0; key < keys; key += kGemmRows<T>) {
    while (first < queries && seen[first] <= key) ++first;
    accumulate(std::min(kGemmRows<T>, keys - key), width, queries - first,
               coefficients.from(key, first), rows.from(first), guarded,
               target + key * target_stride, target_stride);
  }
}

}  // namespace
}  // namespace driftar::cpu
