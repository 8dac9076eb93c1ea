#pragma once

// What the backward pass is divided into, and the gradient of a row of scores. Only for kernel
// files.

#include "attention_operands.h"

#include <cmath>
#include <tuple>
#include <vector>

namespace driftar::cpu {
namespace {

// What the gradient of a row of scores needs: q = exp(s - shift), p = share q.
template <typename T>
struct RowGradient {
  T shift, share, delta, weight, cross;
};

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

// Keys on one side of entropy_from.
struct CountedTile : Tile {
  bool counted;
};

// The keys that a thread takes next, from this head on.
struct NextKeys {
  int64_t b, key_head;
  Tile tile;  // without keys behind the last ones
};

// A task of AttentionKernel::backward: every call.splits-th tile of the keys of one head, or of all
// heads with "map", and the query heads that they serve.
template <typename scalar_t>
class BackwardTask {
  int64_t splits, split;
  std::vector<CountedTile> tiles;  // of all splits
  NextKeys behind{0, 0, {0, 0}};

 public:
  int64_t b, key_head, key_heads, head, heads;

  BackwardTask(const AttentionBackward<scalar_t>& call, int64_t task, int64_t key_block)
      : splits(call.splits) {
    const int64_t units = call.entropy == EntropyKind::map ? 1 : call.key_heads;
    const int64_t of_split = call.batch * units, group = call.query_heads / call.key_heads;
    key_heads = call.key_heads / units, heads = key_heads * group;
    split = task / of_split, b = task / units % call.batch;
    key_head = task % units * key_heads, head = key_head * group;

    const bool wants_entropy = call.entropy != EntropyKind::none;
    const int64_t from = wants_entropy ? std::min(call.entropy_from, call.key_length) : 0;
    for (const auto& [first, last, counted] :
         {std::tuple{int64_t{0}, from, false}, std::tuple{from, call.key_length, wants_entropy}}) {
      for (int64_t column = first; column < last; column += key_block) {
        tiles.push_back({{column, std::min(key_block, last - column)}, counted});
      }
    }
    if (++task == splits * of_split) return;
    behind = {task / units % call.batch, task % units * key_heads, tiles[task / of_split]};
  }

  // Calls process(tile, next) for the tiles in turn.
  template <typename Process>
  void for_each_tile(Process&& process) const {
    const int64_t count = tiles.size();
    for (int64_t t = split; t < count; t += splits) {
      process(tiles[t], t + splits < count ? NextKeys{b, key_head, tiles[t + splits]} : behind);
    }
  }
};

// A block of queries will be differentiated.
template <typename scalar_t>
void expect_queries(const AttentionBackward<scalar_t>& call, const QueryBlock<scalar_t>& block,
                    Upcoming& upcoming) {
  expect(call.query, block.b, block.head, block.row, block.rows, call.width, upcoming);
  expect(call.grad_out, block.b, block.head, block.row, block.rows, call.value_width, upcoming);
}

// The gradients of a tile of keys will be stored.
template <typename scalar_t>
void expect_key_gradients(const AttentionBackward<scalar_t>& call, int64_t b, int64_t key_head,
                          const Tile& tile, Upcoming& upcoming) {
  const int64_t first = (b * call.key_heads + key_head) * call.key_length + tile.column;
  upcoming.add(Rows<scalar_t>{call.grad_key + first * call.width, call.width}, tile.columns,
               call.width);
  upcoming.add(Rows<scalar_t>{call.grad_value + first * call.value_width, call.value_width},
               tile.columns, call.value_width);
}

}  // namespace
}  // namespace driftar::cpu
