#pragma once

// Blocks of many queries with transposed scores: a vector holds what neighbouring queries give one
// key. Keys are then the left operand of the first product as they lie, and every query keeps its
// statistics in a lane of its own; only the queries are packed. Only for kernel files.

#include "attention_lanes.h"
#include "attention_operands.h"

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

// Where a block leaves exp(score - maximum over E) of the keys of E, which then form one tile.
template <typename T>
struct KeptScores {
  T* scores;  // [groups, stride, kGroup], set up to the last key that a query of the group sees;
              // null: not kept
  int64_t stride;
  T* inverses;  // [rows]: 1 / sum over E of what is kept, 0 for an empty row
};

// Out and the statistics of a block.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void forward_columns(const AttentionForward<scalar_t>& call, const QueryBlock<scalar_t>& block,
                     int64_t key_block, KeptScores<acc_t> kept, acc_t* memory) {
  constexpr int64_t group = kGroup<acc_t>, lanes = Vector<acc_t>::size();
  const int64_t rows = block.count();
  const int64_t value_width = whole_vectors<acc_t>(call.value_width);
  const int64_t out_stride = padded<acc_t>(call.value_width);

  using stored_t = stored_type<scalar_t>;
  using element_t = element_type<scalar_t>;
  const int64_t stored_width = padded<stored_t>(call.width);
  const int64_t stored_value_width = padded<stored_t>(call.value_width);
  const int64_t depth = transposed_depth<stored_t, element_t>(call.width);

  Scratch<acc_t> scratch{memory};
  auto* query_buffer = scratch.template take_as<stored_t>(rows * stored_width);
  auto* key_buffer = scratch.template take_as<stored_t>(key_block * stored_width);
  auto* value_buffer = scratch.template take_as<stored_t>(key_block * stored_value_width);
  auto* packed = scratch.template take_as<element_t>(whole_groups<acc_t>(rows) * depth);
  // Of pairs: values, and the weights of a tile.
  auto* packed_values = scratch.template take_as<element_t>(
      kPaired<element_t> ? key_block * elements<element_t>(stored_value_width) : 0);
  auto* rounded = scratch.template take_as<element_t>(
      kPaired<element_t> ? group * elements<element_t>(key_block) : 0);
  acc_t* out = scratch.take(rows * out_stride);
  const LaneStatistics<acc_t> statistics(rows, scratch);
  LaneStatistics<acc_t> in_entropy(rows, scratch);
  acc_t* tile_scores = scratch.take(group * key_block);
  acc_t* bias = scratch.next;
  std::fill_n(out, rows * out_stride, acc_t(0));
  transposed_operand(block.load(call.query, call.width, query_buffer), rows, call.width, call.scale,
                     packed);

  const bool wants_entropy = call.entropy != EntropyKind::none;
  const bool counts = wants_entropy && call.visibility.mask != nullptr;
  std::vector<int64_t> support(counts ? rows : 0);

  const auto absorb_keys = [&](int64_t first, int64_t last, bool keep) {
    for (int64_t column = first; column < last; column += key_block) {
      const Tile tile{column, std::min(key_block, last - column)};
      const Rows<stored_t> keys = load_rows(call.key, block.b, block.key_head(), column,
                                            tile.columns, call.width, key_buffer);
      const Rows<stored_t> value_rows = load_rows(call.value, block.b, block.key_head(), column,
                                                  tile.columns, call.value_width, value_buffer);
      const bool guarded =
          is_partial(block, tile) &&
          !all_finite(value_rows, tile.columns, whole_vectors<stored_t>(call.value_width));
      const auto values = right_operand(value_rows, tile.columns, call.value_width, packed_values);
      const Rows<element_t> left = left_operand(keys);
      const bool counted = wants_entropy && column >= call.entropy_from;
      // The next keys and values are asked for in portions, while there is something to compute.
      const int64_t coming = std::min(last - column - tile.columns, key_block);
      const int64_t portion = (coming * group + rows - 1) / rows;
      for_each_strip(block, tile, group, [&](const Strip& strip) {
        acc_t* scores = keep ? kept.scores + strip.first * kept.stride : tile_scores;
        const bool narrow = strip.rows <= lanes;
        const int64_t ahead = strip.first / group * portion;
        const int64_t asked = std::min(portion, coming - ahead);
        prefetch(keys.from(tile.columns + ahead), keys.data == key_buffer ? 0 : asked, call.width);
        prefetch(value_rows.from(tile.columns + ahead), value_rows.data == value_buffer ? 0 : asked,
                 call.value_width);
        const element_t* queries = packed + strip.first * depth;
        multiply(strip.columns, narrow ? lanes : group, elements<element_t>(call.width),
                 kPaired<element_t> ? call.scale : acc_t(1),
                 Strided<element_t>{left.data, left.stride, 1}, in_place(queries, group), acc_t(0),
                 scores, group);
        hide_columns(block, tile, strip, scores, bias,
                     counts && counted ? support.data() + strip.first : nullptr);
        acc_t* strip_out = out + strip.first * out_stride;
        (narrow ? softmax_columns<1, acc_t>
                : softmax_columns<2, acc_t>)(statistics, strip.first, strip.rows, scores,
                                             strip.columns,
                                             counted && call.entropy == EntropyKind::head,
                                             strip_out, out_stride, value_width);
        if constexpr (kPaired<element_t>) {
          narrow_interleaved({scores, group}, strip.columns, narrow ? lanes : group, rounded);
        }
        accumulate(strip.rows, value_width, strip.columns,
                   rounded_to(Strided<acc_t>{scores, 1, group}, rounded, 1, group), values, guarded,
                   strip_out, out_stride);
      });
    }
  };

  // The keys that count for the entropy come first: their statistics are those of all keys so far.
  const int64_t end = visible_end(call, block.b, block.row + block.rows - 1);
  const int64_t from = wants_entropy ? std::min(call.entropy_from, end) : 0;
  absorb_keys(from, end, kept.scores != nullptr);
  in_entropy.copy(statistics);
  absorb_keys(0, from, false);

  for (int64_t first = 0; first < rows; first += group) {
    const int64_t last = std::min(first + group, rows);
    int64_t sizes[group] = {};
    for (int64_t r = first; wants_entropy && r < last; ++r) {
      sizes[r - first] = counts ? support[r] : support_size(call, block.b, block.query_of(r));
    }
    const GroupResult<acc_t> result(statistics, in_entropy, first, sizes, call.normalize);
    for (int64_t r = first; r < last; ++r) {
      store_row(call, block, r, result.row(r - first), out + r * out_stride);
    }
    if (kept.scores != nullptr)
      std::copy_n(result.entropy_inverse, last - first, kept.inverses + first);
  }
}

}  // namespace
}  // namespace driftar::cpu
