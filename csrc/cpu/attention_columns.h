#pragma once

// Blocks of many queries with transposed scores: a vector holds what neighbouring queries give one
// key. Keys are then the left operand of the first product as they lie, and every query keeps its
// statistics in a lane of its own. Only for kernel files.

#if defined(__AMX_BF16__)
#include "attention_amx_columns.h"
#else
#include "attention_vector_columns.h"
#endif

#include <type_traits>
#include <vector>

namespace driftar::cpu {
namespace {

// Transposed scores become -inf where a key is hidden from its query. `bias` holds two tiles. Of a
// masked call, adds the keys that each query sees to `support` unless null.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void hide_columns(const QueryBlock<scalar_t>& block, const Tile& tile, const Strip& strip,
                  acc_t* scores, acc_t* bias, int64_t* support) {
  using V = Vector<acc_t>;
  constexpr int64_t group = kGroup<acc_t>;
  if (!strip.partial) return;
  const AttentionShape<scalar_t>& shape = block.shape;
  const V none(kHidden<acc_t>);
  if (shape.visibility.mask == nullptr && shape.visibility.ancestors == nullptr) {
    // Query i sees the first seen[i] keys of the tile.
    alignas(64) acc_t seen[group];
    int64_t least = strip.columns;
    std::fill_n(seen, group, static_cast<acc_t>(strip.columns));
    for (int64_t r = 0; r < strip.rows; ++r) {
      const int64_t end = visible_end(shape, block.b, block.query_of(strip.first + r));
      const int64_t count = std::clamp<int64_t>(end - tile.column, 0, strip.columns);
      seen[r] = static_cast<acc_t>(count);
      least = std::min(least, count);
    }
    for (int64_t j = least; j < strip.columns; ++j) {
      for (int64_t lane = 0; lane < group; lane += V::size()) {
        acc_t* own = scores + j * group + lane;
        V::blendv(V::loadu(own), none, V::loadu(seen + lane) <= V(static_cast<acc_t>(j)))
            .store(own);
      }
    }
    return;
  }
  const int64_t stride = whole_vectors<acc_t>(strip.columns);
  acc_t* turned = bias + group * stride;
  std::fill_n(bias, group * stride, acc_t(0));
  hide_keys(block, tile, strip, bias, stride);
  for (int64_t r = 0; support != nullptr && r < strip.rows; ++r) {
    support[r] += count_visible(bias + r * stride, strip.columns);
  }
  for (int64_t j = 0; j < stride; j += V::size()) {
    for (int64_t lane = 0; lane < group; lane += V::size()) {
      transpose_square(bias + lane * stride + j, stride, acc_t(1), turned + j * group + lane,
                       group);
    }
  }
  for (int64_t i = 0; i < strip.columns * group; i += V::size()) {
    const V change = V::loadu(turned + i);
    // Selected rather than added, so that NaN stays hidden.
    V::blendv(V::loadu(scores + i) + change, none, change == none).store(scores + i);
  }
}

// rows[key, lane] *= factors, one a query
template <typename T>
void scale_lanes(const T* factors, int64_t keys, T* rows) {
  using V = Vector<T>;
  for (int64_t i = 0; i < keys * kGroup<T>; i += V::size()) {
    (V::loadu(rows + i) * V::loadu(factors + i % kGroup<T>)).store(rows + i);
  }
}

// Where a block leaves exp(score - shift) of the keys of E, which then form one tile.
template <typename T>
struct KeptScores {
  T* scores;  // [groups, stride, kGroup], set up to the last key that a query of the group sees;
              // null: not kept
  int64_t stride;
  T* inverses;  // [rows]: 1 / sum over E of what is kept, 0 for an empty row
};

// What to ask for while a tile is computed: the next keys of its block or, during the last ones,
// the rows of out, which are written then, and what `next`, the block that follows or null, begins
// with.
template <typename scalar_t>
void expect_rows(const AttentionForward<scalar_t>& call, const QueryBlock<scalar_t>& block,
                 const QueryBlock<scalar_t>* next, const KeyOrder& order, const Tile& tile,
                 Upcoming& upcoming) {
  upcoming.clear();
  const Tile following = order.after(tile);
  if (following.columns > 0) {
    return expect_keys(call, block.b, block.key_head(), following, upcoming);
  }
  upcoming.add(Rows<scalar_t>{call.out + block.index(0) * call.value_width, call.value_width},
               block.count(), call.value_width);
  if (next == nullptr) return;
  // Where several heads share a block their rows lie together, as a rule.
  expect(call.query, next->b, next->head, next->row, next->count(), call.width, upcoming);
  const Tile first = KeyOrder(*next, order.key_block).first();
  expect_keys(call, next->b, next->key_head(), first, upcoming);
}

// Out and the statistics of a block; `next` is the one that follows, or null.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void forward_columns(const AttentionForward<scalar_t>& call, const QueryBlock<scalar_t>& block,
                     const QueryBlock<scalar_t>* next, int64_t key_block, KeptScores<acc_t> kept,
                     acc_t* memory) {
  constexpr int64_t group = kGroup<acc_t>, lanes = Vector<acc_t>::size();
  const int64_t rows = block.count();

  Scratch<acc_t> scratch{memory};
  ColumnProducts<scalar_t> products(block, key_block, scratch);
  const LaneStatistics<acc_t> statistics(products.unit(), rows, scratch);
  LaneStatistics<acc_t> in_entropy(products.unit(), rows, scratch);
  const int64_t step = std::min(key_block, products.kStep);
  acc_t* tile_scores = scratch.take(group * step);
  acc_t* bias = scratch.next;

  const bool wants_entropy = call.entropy != EntropyKind::none;
  const bool counts = wants_entropy && call.visibility.mask != nullptr;
  std::vector<int64_t> support(counts ? rows : 0);

  const KeyOrder order(block, key_block);
  Upcoming upcoming;
  const auto between = [&] { upcoming.ask(); };

  const auto absorb_keys = [&](const Tile& tile, bool counted) {
    const bool keep = counted && kept.scores != nullptr;
    products.load(tile);
    expect_rows(call, block, next, order, tile, upcoming);
    const auto turns = [&](int64_t i) {
      const int64_t end = visible_end(call, block.b, i) - tile.column;
      return products.turns(std::clamp<int64_t>(end, 0, tile.columns));
    };
    upcoming.divide((turns(block.row) + turns(block.row + block.rows - 1)) * statistics.lanes /
                    (2 * group));
    for_each_strip(block, tile, group, [&](const Strip& strip) {
      acc_t* strip_scores = keep ? kept.scores + strip.first * kept.stride : tile_scores;
      for (int64_t key = 0; key < strip.columns; key += step) {
        const Tile part{tile.column + key, std::min(step, strip.columns - key)};
        const Strip piece = strip.part(key, part.columns, call.visibility.mask != nullptr);
        acc_t* scores = keep ? strip_scores + key * group : strip_scores;
        products.multiply_keys(piece, key, scores, between);
        hide_columns(block, part, piece, scores, bias,
                     counts && counted ? support.data() + strip.first : nullptr);
        const auto softmax = [&](auto vectors) {
          softmax_columns<decltype(vectors)::value>(
              statistics, strip.first, scores, part.columns,
              counted && call.entropy == EntropyKind::head,
              [&](const acc_t* factors) {
                products.shrink(piece, factors);
                if (keep) scale_lanes(factors, key, strip_scores);
              },
              products.weights(scores, keep));
        };
        strip.rows <= lanes ? softmax(std::integral_constant<int64_t, 1>{})
                            : softmax(std::integral_constant<int64_t, 2>{});
        products.multiply_values(piece, key, scores, between);
      }
    });
  };

  Tile tile = order.first();
  for (; order.counts(tile); tile = order.after(tile)) absorb_keys(tile, true);
  in_entropy.copy(statistics);
  for (; tile.columns > 0; tile = order.after(tile)) absorb_keys(tile, false);

  for (int64_t first = 0; first < rows; first += group) {
    const int64_t last = std::min(first + group, rows);
    int64_t sizes[group] = {};
    for (int64_t r = first; wants_entropy && r < last; ++r) {
      sizes[r - first] = counts ? support[r] : support_size(call, block.b, block.query_of(r));
    }
    const GroupResult<acc_t> result(statistics, in_entropy, first, sizes, call.normalize);
    products.store(call, first, last - first, result.inverse);
    result.store(call, block, first, last - first);
    if (kept.scores != nullptr)
      std::copy_n(result.entropy_inverse, last - first, kept.inverses + first);
  }
}

}  // namespace
}  // namespace driftar::cpu
