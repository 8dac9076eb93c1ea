#pragma once

// One block of queries through all its keys: out and the statistics of every row. Only for kernel
// files.

#include "attention_columns.h"
#include "attention_few_products.h"

#include <vector>

namespace driftar::cpu {
namespace {

// Up to so many queries are one strip of vectors. Tiles pay from fewer on.
#if defined(__AMX_BF16__)
template <typename E>
constexpr int64_t kMostFew = 4;
#else
template <typename E>
constexpr int64_t kMostFew = kFewRows<E>;
#endif

// SoftmaxStatistics of every row of a block, with the sums spread over the lanes of a vector.
template <typename T>
struct BlockStatistics {
  T maximum[kQueryBlock];
  T* totals;   // [rows, vector]
  T* moments;  // [rows, vector]

  static constexpr int64_t lanes = Vector<T>::size();

  void clear(int64_t rows) {
    std::fill(maximum, maximum + rows, kHidden<T>);
    std::fill(totals, totals + rows * lanes, T(0));
    std::fill(moments, moments + rows * lanes, T(0));
  }

  // Takes in the scores of row r and turns them into exp(score - maximum). `out`, the row's sum of
  // values weighted with earlier exponentials, shrinks with them when the maximum rises.
  void absorb(int64_t r, T* scores, int64_t count, T* out, int64_t out_count) {
    Vector<T> total = Vector<T>::loadu(totals + r * lanes);
    Vector<T> moment = Vector<T>::loadu(moments + r * lanes);
    const Vector<T> maxima = row_maxima(scores, count);
    if (!all_at_most(maxima, maximum[r])) {
      SoftmaxStatistics<T> unit{maximum[r], T(1), T(0)};
      const T factor = unit.raise(SoftmaxStatistics<T>::larger(maximum[r], maximum_of(maxima)));
      maximum[r] = unit.maximum;
      // raise() moved a total of 1 and a moment of 0.
      moment = at::vec::fmadd(moment, Vector<T>(factor), total * Vector<T>(unit.moment));
      total = total * Vector<T>(factor);
      for (int64_t c = 0; c < out_count; c += lanes) {
        (Vector<T>::loadu(out + c) * Vector<T>(factor)).store(out + c);
      }
    }
    absorb_exponentials(scores, count, SoftmaxStatistics<T>::shift(maximum[r]), total, moment);
    total.store(totals + r * lanes);
    moment.store(moments + r * lanes);
  }

  SoftmaxStatistics<T> row(int64_t r) const {
    return {maximum[r], sum_of(Vector<T>::loadu(totals + r * lanes)),
            sum_of(Vector<T>::loadu(moments + r * lanes))};
  }
};

// Of a few queries, one strip.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void forward_few(const AttentionForward<scalar_t>& call, const QueryBlock<scalar_t>& block,
                 acc_t* memory) {
  using Products = FewProducts<scalar_t>;
  const int64_t rows = block.count();
  const int64_t value_width = whole_vectors<acc_t>(call.value_width);
  const int64_t out_stride = padded<acc_t>(call.value_width);
  const int64_t key_block = forward_key_block(call);

  Scratch<acc_t> scratch{memory};
  Products products(block, key_block, scratch);
  acc_t* scores = scratch.take(Products::strip_rows * key_block);
  acc_t* out = scratch.take(rows * out_stride);
  BlockStatistics<acc_t> statistics;
  statistics.totals = scratch.take(rows * statistics.lanes);
  statistics.moments = scratch.take(rows * statistics.lanes);
  statistics.clear(rows);
  std::fill(out, out + rows * out_stride, acc_t(0));

  const bool wants_entropy = call.entropy != EntropyKind::none;
  const bool counts = wants_entropy && call.visibility.mask != nullptr;
  std::vector<int64_t> support(counts ? rows : 0);

  const auto absorb_keys = [&](const Tile& tile, bool counted) {
    products.load(tile);
    for_each_strip(block, tile, Products::strip_rows, [&](const Strip& strip) {
      products.multiply_keys(strip, scores);
      hide_keys(block, tile, strip, scores, key_block);
      for (int64_t r = 0; r < strip.rows; ++r) {
        acc_t* row_scores = scores + r * key_block;
        acc_t* row_out = out + (strip.first + r) * out_stride;
        if (counts && counted) {
          support[strip.first + r] += count_visible(row_scores, strip.columns);
        }
        statistics.absorb(strip.first + r, row_scores, whole_vectors<acc_t>(strip.columns), row_out,
                          value_width);
      }
      products.multiply_values(strip, scores, out + strip.first * out_stride, out_stride);
    });
  };

  const KeyOrder order(block, key_block);
  Tile tile = order.first();
  for (; order.counts(tile); tile = order.after(tile)) absorb_keys(tile, true);
  std::vector<SoftmaxStatistics<acc_t>> in_entropy(order.from > 0 ? rows : 0);
  for (size_t r = 0; r < in_entropy.size(); ++r) in_entropy[r] = statistics.row(r);
  for (; tile.columns > 0; tile = order.after(tile)) absorb_keys(tile, false);

  for (int64_t r = 0; r < rows; ++r) {
    const SoftmaxStatistics<acc_t> all = statistics.row(r);
    const int64_t size = counts          ? support[r]
                         : wants_entropy ? support_size(call, block.b, block.query_of(r))
                                         : 0;
    const RowResult<acc_t> result =
        row_result(all, order.from > 0 ? in_entropy[r] : all, size, call.normalize);
    store_scaled(out + r * out_stride, call.value_width, result.inverse,
                 call.out + block.index(r) * call.value_width);
    store_statistics(call, block, r, result);
  }
}

// `next` is the block that follows, or null.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void forward_block(const AttentionForward<scalar_t>& call, const QueryBlock<scalar_t>& block,
                   const QueryBlock<scalar_t>* next, acc_t* memory) {
  if (block.count() <= kMostFew<element_type<scalar_t>>) {
    forward_few(call, block, memory);
  } else {
    forward_columns(call, block, next, forward_key_block(call), KeptScores<acc_t>{}, memory);
  }
}

}  // namespace
}  // namespace driftar::cpu
