#include "attention_forward_block.h"

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

}  // namespace

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::map_forward(const AttentionForward<scalar_t>& call,
                                                 int64_t task, acc_t* memory) {
  const int64_t row_blocks = call.blocking.row_blocks;
  const int64_t row = task % row_blocks * call.blocking.rows, b = task / row_blocks;
  const int64_t rows = std::min(call.blocking.rows, call.query_length - row);
  const int64_t heads = call.query_heads, group = heads / call.key_heads;
  const int64_t stride = whole_panels<scalar_t>(call.key_length);

  Scratch<acc_t> scratch{memory};
  acc_t* kept = scratch.take((heads * rows + amx_slack(call)) * stride);
  acc_t* inverses = scratch.take(heads * rows);
  acc_t* logarithms = scratch.take(stride);
  for (int64_t head = 0; head < heads;) {
    const int64_t together = std::min(call.blocking.heads, group - head % group);
    forward_block(call, QueryBlock<scalar_t>{call, b, head, together, row, rows},
                  {kept + head * rows * stride, stride, inverses + head * rows}, scratch.next);
    head += together;
  }

  const acc_t share = acc_t(1) / static_cast<acc_t>(heads);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = row + r;
    const int64_t count =
        whole_vectors<acc_t>(std::max<int64_t>(visible_end(call, b, i) - call.entropy_from, 0));
    for (int64_t j = 0; j < count; j += Vector<acc_t>::size()) {
      Vector<acc_t> sum(acc_t(0));
      for (int64_t k = r; k < heads * rows; k += rows) {
        sum = at::vec::fmadd(Vector<acc_t>::loadu(kept + k * stride + j),
                             Vector<acc_t>(inverses[k] * share), sum);
      }
      sum.store(logarithms + j);
    }
    row_logarithm(logarithms, count);
    store_map_norm(call, b, i);
    acc_t* crosses = of_heads(call, call.entropy_cross, b, i);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t k = h * rows + r;
      crosses[h * call.query_length] = inverses[k] * row_dot(kept + k * stride, logarithms, count);
    }
    store_map_entropy(call, b, i);
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
