#include "attention_columns.h"

#include <type_traits>

namespace driftar::cpu {

namespace {

// The statistic of query i in every head.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
acc_t* of_heads(const AttentionForward<scalar_t>& call, acc_t* values, int64_t b, int64_t i) {
  return values + b * call.query_heads * call.query_length + i;
}

// forward_block leaves |E_i| of every head in entropy_cross; the largest one counts.
template <typename scalar_t>
void store_map_norm(const AttentionForward<scalar_t>& call, int64_t b, int64_t i) {
  using acc_t = accumulate_t<scalar_t>;
  const acc_t* sizes = of_heads(call, call.entropy_cross, b, i);
  acc_t support = 0;
  for (int64_t h = 0; h < call.query_heads; ++h) {
    support = std::max(support, sizes[h * call.query_length]);
  }
  call.entropy_norm[b * call.query_length + i] =
      entropy_norm<acc_t>(static_cast<int64_t>(support), call.normalize);
}

// entropy_cross is sum_j p_hj log pbar_j; its mean over the heads is sum_j pbar_j log pbar_j = -H.
template <typename scalar_t>
void store_map_entropy(const AttentionForward<scalar_t>& call, int64_t b, int64_t i) {
  using acc_t = accumulate_t<scalar_t>;
  const acc_t* crosses = of_heads(call, call.entropy_cross, b, i);
  acc_t sum = 0;
  for (int64_t h = 0; h < call.query_heads; ++h) sum += crosses[h * call.query_length];
  const acc_t entropy = std::max(-sum / static_cast<acc_t>(call.query_heads), acc_t(0));
  const int64_t index = b * call.query_length + i;
  call.entropy_out[index] = (sum != sum ? sum : entropy) * call.entropy_norm[index];
}

// crosses[h, lane] = sum_j e_hj log pbar_j for a group of queries, pbar = sum_h share_h e_h their
// average over the heads. Of every head, e [keys, kGroup] lie head_stride apart and the shares
// share_stride. A few keys of all heads at a time are read twice, from the first-level cache.
template <typename T>
void cross_entropies(const T* e, int64_t head_stride, const T* shares, int64_t share_stride,
                     int64_t heads, int64_t keys, T* crosses) {
  using V = Vector<T>;
  constexpr int64_t group = kGroup<T>, together = 8;
  const V floor(std::numeric_limits<T>::min());
  std::fill_n(crosses, heads * group, T(0));
  const auto take = [&](int64_t j, auto number) {
    constexpr int64_t count = decltype(number)::value;
    for (int64_t lane = 0; lane < group; lane += V::size()) {
      V average[count];
      for (V& x : average) x = V(T(0));
      const T* own = e + j * group + lane;
      for (int64_t h = 0; h < heads; ++h, own += head_stride) {
        const V share = V::loadu(shares + h * share_stride + lane);
#pragma GCC unroll 8
        for (int64_t k = 0; k < count; ++k) {
          average[k] = at::vec::fmadd(V::loadu(own + k * group), share, average[k]);
        }
      }
      for (V& x : average) x = at::vec::maximum(x, floor).log();
      own = e + j * group + lane;
      for (int64_t h = 0; h < heads; ++h, own += head_stride) {
        V cross = V::loadu(crosses + h * group + lane);
#pragma GCC unroll 8
        for (int64_t k = 0; k < count; ++k) {
          cross = at::vec::fmadd(V::loadu(own + k * group), average[k], cross);
        }
        cross.store(crosses + h * group + lane);
      }
    }
  };
  int64_t j = 0;
  for (; j + together <= keys; j += together) take(j, std::integral_constant<int64_t, together>{});
  for (; j < keys; ++j) take(j, std::integral_constant<int64_t, 1>{});
}

}  // namespace

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::map_forward(const AttentionForward<scalar_t>& call,
                                                 int64_t task, acc_t* memory) {
  const int64_t heads = call.query_heads, row_blocks = call.blocking.row_blocks;
  // Blocks in turn: of a task, head by head.
  const auto block_of = [&](int64_t turn) {
    const int64_t sample = turn / heads / row_blocks;
    const int64_t first = turn / heads % row_blocks * call.blocking.rows;
    const int64_t count = std::min(call.blocking.rows, call.query_length - first);
    return QueryBlock<scalar_t>{call, sample, turn % heads, 1, first, count};
  };
  const QueryBlock<scalar_t> first_block = block_of(task * heads);
  const int64_t b = first_block.b, row = first_block.row, rows = first_block.rows;
  const int64_t stride = whole_panels<scalar_t>(call.key_length);

  constexpr int64_t group_rows = kGroup<acc_t>;
  const int64_t padded_rows = whole_groups<acc_t>(rows), of_head = padded_rows * stride;
  Scratch<acc_t> scratch{memory};
  acc_t* kept = scratch.take(heads * of_head);
  acc_t* shares = scratch.take(heads * padded_rows);  // of a probability in the average
  acc_t* crosses = scratch.take(heads * group_rows);
  for (int64_t h = 0; h < heads; ++h) {
    acc_t* own = shares + h * padded_rows;
    std::fill_n(own, padded_rows, acc_t(0));
    const int64_t turn = task * heads + h, turns = call.batch * row_blocks * heads;
    const QueryBlock<scalar_t> next = block_of(std::min(turn + 1, turns - 1));
    forward_columns(call, block_of(turn), turn + 1 < turns ? &next : nullptr, stride,
                    KeptScores<acc_t>{kept + h * of_head, stride, own}, scratch.next);
    for (int64_t r = 0; r < rows; ++r) own[r] /= static_cast<acc_t>(heads);
  }
  for (int64_t first = 0; first < rows; first += group_rows) {
    const int64_t last = std::min(first + group_rows, rows);
    const int64_t end = visible_end(call, b, row + last - 1);
    cross_entropies(kept + first * stride, of_head, shares + first, padded_rows, heads,
                    std::max<int64_t>(end - call.entropy_from, 0), crosses);
    for (int64_t r = first; r < last; ++r) {
      const int64_t i = row + r;
      store_map_norm(call, b, i);
      acc_t* of_row = of_heads(call, call.entropy_cross, b, i);
      for (int64_t h = 0; h < heads; ++h) {
        const acc_t weight = shares[h * padded_rows + r] * static_cast<acc_t>(heads);
        of_row[h * call.query_length] = crosses[h * group_rows + r - first] * weight;
      }
      store_map_entropy(call, b, i);
    }
  }
}

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::map_entropy(const AttentionForward<scalar_t>& call,
                                                 int64_t task, acc_t* memory) {
  const int64_t row_blocks = blocks(call.query_length, kMapQueryBlock);
  const int64_t row = task % row_blocks * kMapQueryBlock;
  const int64_t b = task / row_blocks;
  const int64_t heads = call.query_heads;
  const int64_t rows = std::min(kMapQueryBlock, call.query_length - row);

  Scratch<acc_t> scratch{memory};
  using stored_t = stored_type<scalar_t>;
  using element_t = element_type<scalar_t>;
  const int64_t stored_width = padded<stored_t>(call.width);
  auto* query_buffer = scratch.template take_as<stored_t>(kMapQueryBlock * stored_width);
  auto* key_buffer = scratch.template take_as<stored_t>(kMapKeyBlock * stored_width);
  auto* packed =
      scratch.template take_as<element_t>(kMapKeyBlock * elements<element_t>(stored_width));
  acc_t* tiles = scratch.take(heads * kMapTile);
  acc_t* average = scratch.take(kMapTile);

  for (int64_t i = row; i < row + rows; ++i) {
    store_map_norm(call, b, i);
    acc_t* crosses = of_heads(call, call.entropy_cross, b, i);
    for (int64_t h = 0; h < heads; ++h) crosses[h * call.query_length] = acc_t(0);
  }

  const int64_t end = visible_end(call, b, row + rows - 1);
  for (int64_t column = call.entropy_from; column < end; column += kMapKeyBlock) {
    const Tile tile{column, std::min(kMapKeyBlock, end - column)};
    std::fill(average, average + rows * kMapKeyBlock, acc_t(0));
    for (int64_t h = 0; h < heads; ++h) {
      const QueryBlock<scalar_t> block{call, b, h, 1, row, rows};
      const Rows<stored_t> keys =
          load_rows(call.key, b, block.key_head(), column, tile.columns, call.width, key_buffer);
      map_probabilities(block, tile,
                        of_heads(call, call.entropy_lse, b, row) + h * call.query_length,
                        left_operand(block.load(call.query, call.width, query_buffer)),
                        transposed_operand(keys, tile.columns, call.width, call.scale, packed),
                        kMapKeyBlock, tiles + h * kMapTile, average);
    }
    row_logarithm(average, rows * kMapKeyBlock);
    for (int64_t r = 0; r < rows; ++r) {
      acc_t* crosses = of_heads(call, call.entropy_cross, b, row + r);
      for (int64_t h = 0; h < heads; ++h) {
        crosses[h * call.query_length] += row_dot(tiles + h * kMapTile + r * kMapKeyBlock,
                                                  average + r * kMapKeyBlock, kMapKeyBlock);
      }
    }
  }
  for (int64_t i = row; i < row + rows; ++i) store_map_entropy(call, b, i);
}

}  // namespace driftar::cpu

#include "attention_instances.h"
