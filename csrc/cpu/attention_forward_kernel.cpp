#include "attention_tile.h"

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
  int64_t count = 0;
  for (int64_t c = 0; c < columns; ++c) count += row[c] != kHidden<acc_t>;
  return count;
}

template <typename acc_t>
acc_t entropy_norm(int64_t support, bool normalize) {
  if (support <= 1) return acc_t(0);
  return normalize ? acc_t(1) / std::log(static_cast<acc_t>(support)) : acc_t(1);
}

// Adds a block of scores to a row's statistics; writes exp(score - maximum) to `out` unless it is
// null. Returns the factor by which sums weighted with earlier exponentials must shrink.
template <typename acc_t>
acc_t absorb(SoftmaxStatistics<acc_t>& statistics, const acc_t* row, int64_t stride, acc_t* out) {
  using Statistics = SoftmaxStatistics<acc_t>;
  const acc_t maximum = Statistics::larger(statistics.maximum, row_maximum(row, stride));
  const acc_t factor = statistics.raise(maximum);
  acc_t total, moment;
  row_exponentials(row, stride, Statistics::shift(maximum), out, total, moment);
  statistics.add(total, moment);
  return factor;
}

}  // namespace

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::forward(const AttentionForward<scalar_t>& call, int64_t task,
                                             acc_t* memory) {
  const int64_t row_blocks = blocks(call.query_length, kQueryBlock);
  const int64_t row = task % row_blocks * kQueryBlock;
  const int64_t h = task / row_blocks % call.query_heads;
  const int64_t b = task / row_blocks / call.query_heads;
  const int64_t key_head = h / (call.query_heads / call.key_heads);
  const int64_t rows = std::min(kQueryBlock, call.query_length - row);

  Scratch<acc_t> scratch{memory};
  acc_t* query_buffer = scratch.take(kQueryBlock * call.width);
  acc_t* key_buffer = scratch.take(kKeyBlock * call.width);
  acc_t* value_buffer = scratch.take(kKeyBlock * call.value_width);
  acc_t* out = scratch.take(kQueryBlock * call.value_width);
  acc_t* scores = scratch.take(kQueryBlock * kKeyBlock);
  acc_t* row_buffer = scratch.take(kKeyBlock);

  // With entropy_from > 0 the entropy set differs from the visible set and keeps statistics of its
  // own.
  const bool wants_entropy = call.entropy != EntropyKind::none;
  const bool separate = wants_entropy && call.entropy_from > 0;
  const bool counts = wants_entropy && call.visibility.mask != nullptr;
  SoftmaxStatistics<acc_t> visible[kQueryBlock], member[kQueryBlock];
  int64_t support[kQueryBlock] = {};
  std::fill(out, out + rows * call.value_width, acc_t(0));

  const Rows<acc_t> queries =
      load_rows(call.query, b, h, row, rows, call.width, call.scale, query_buffer);
  for_each_tile(call, b, row, rows, kKeyBlock, [&](const Tile& tile) {
    const Rows<acc_t> keys = load_rows(call.key, b, key_head, tile.column, tile.columns, call.width,
                                       acc_t(1), key_buffer);
    const Rows<acc_t> values = load_rows(call.value, b, key_head, tile.column, tile.columns,
                                         call.value_width, acc_t(1), value_buffer);
    score_tile(call, b, h, tile, queries, keys, scores);
    for (int64_t r = 0; r < rows; ++r) {
      acc_t* row_scores = scores + r * tile.stride;
      const acc_t* counted =
          separate || counts ? entropy_row(call, tile, row_scores, row_buffer) : nullptr;
      if (counts && counted != nullptr) support[r] += count_visible(counted, tile.columns);
      if (separate && counted != nullptr) absorb(member[r], counted, tile.stride, (acc_t*)nullptr);
      const acc_t factor = absorb(visible[r], row_scores, tile.stride, row_scores);
      if (factor != acc_t(1)) row_scale(out + r * call.value_width, call.value_width, factor);
    }
    accumulate(tile, Layout::normal, rows, call.value_width, tile.columns, acc_t(1), scores, values,
               out, call.value_width);
  });

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = (b * call.query_heads + h) * call.query_length + row + r;
    const SoftmaxStatistics<acc_t>& all = visible[r];
    const acc_t inverse = all.empty() ? acc_t(0) : acc_t(1) / all.total;
    scalar_t* target = call.out + i * call.value_width;
    for (int64_t c = 0; c < call.value_width; ++c) {
      target[c] = static_cast<scalar_t>(out[r * call.value_width + c] * inverse);
    }
    call.lse[i] = all.lse();
    call.max_score[i] = all.maximum;
    if (!wants_entropy) continue;
    const SoftmaxStatistics<acc_t>& counted = separate ? member[r] : all;
    call.entropy_lse[i] = counted.lse();
    const int64_t size = counts ? support[r] : support_size(call, b, row + r);
    if (call.entropy == EntropyKind::map) {
      // Support per head, for the second pass to reduce.
      call.entropy_cross[i] = static_cast<acc_t>(size);
      continue;
    }
    const acc_t norm = entropy_norm<acc_t>(size, call.normalize);
    const acc_t entropy = counted.entropy();
    call.entropy_norm[i] = norm;
    call.entropy_cross[i] = -entropy;
    call.entropy_out[i] = entropy * norm;
  }
}

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::map_entropy(const AttentionForward<scalar_t>& call,
                                                 int64_t task, acc_t* memory) {
  const int64_t row_blocks = blocks(call.query_length, kMapQueryBlock);
  const int64_t row = task % row_blocks * kMapQueryBlock;
  const int64_t b = task / row_blocks;
  const int64_t heads = call.query_heads;
  const int64_t group = heads / call.key_heads;
  const int64_t rows = std::min(kMapQueryBlock, call.query_length - row);
  const int64_t tile_size = kMapQueryBlock * kMapKeyBlock;

  Scratch<acc_t> scratch{memory};
  acc_t* query_buffer = scratch.take(kMapQueryBlock * call.width);
  acc_t* key_buffer = scratch.take(kMapKeyBlock * call.width);
  acc_t* tiles = scratch.take(heads * tile_size);
  acc_t* average = scratch.take(tile_size);
  acc_t* row_buffer = scratch.take(kMapKeyBlock);

  const auto statistic = [&](acc_t* values, int64_t h) {
    return values + (b * heads + h) * call.query_length + row;
  };
  for (int64_t r = 0; r < rows; ++r) {
    acc_t support = 0;
    for (int64_t h = 0; h < heads; ++h)
      support = std::max(support, statistic(call.entropy_cross, h)[r]);
    call.entropy_norm[b * call.query_length + row + r] =
        entropy_norm<acc_t>(static_cast<int64_t>(support), call.normalize);
    for (int64_t h = 0; h < heads; ++h) statistic(call.entropy_cross, h)[r] = acc_t(0);
  }

  for_each_tile(call, b, row, rows, kMapKeyBlock, [&](const Tile& tile) {
    if (tile.column + tile.columns <= call.entropy_from) return;
    std::fill(average, average + rows * tile.stride, acc_t(0));
    for (int64_t h = 0; h < heads; ++h) {
      const Rows<acc_t> queries =
          load_rows(call.query, b, h, row, rows, call.width, call.scale, query_buffer);
      const Rows<acc_t> keys = load_rows(call.key, b, h / group, tile.column, tile.columns,
                                         call.width, acc_t(1), key_buffer);
      acc_t* scores = tiles + h * tile_size;
      score_tile(call, b, h, tile, queries, keys, scores);
      add_probabilities(call, tile, statistic(call.entropy_lse, h), scores, row_buffer, average);
    }
    row_logarithm(average, rows * tile.stride);
    // sum_j p_hj log pbar_j; the mean over the heads is sum_j pbar_j log pbar_j = -H.
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < rows; ++r) {
        const acc_t lse = statistic(call.entropy_lse, h)[r];
        const acc_t* scores =
            entropy_row(call, tile, tiles + h * tile_size + r * tile.stride, row_buffer);
        if (lse == kHidden<acc_t>) continue;
        statistic(call.entropy_cross, h)[r] +=
            row_dot_exponentials(scores, tile.stride, lse, average + r * tile.stride);
      }
    }
  });

  for (int64_t r = 0; r < rows; ++r) {
    acc_t sum = 0;
    for (int64_t h = 0; h < heads; ++h) sum += statistic(call.entropy_cross, h)[r];
    const int64_t i = b * call.query_length + row + r;
    const acc_t entropy =
        heads == 0 ? acc_t(0) : std::max(-sum / static_cast<acc_t>(heads), acc_t(0));
    call.entropy_out[i] = (sum != sum ? sum : entropy) * call.entropy_norm[i];
  }
}

template struct AttentionKernel<Isa::DRIFTAR_ISA, float>;
template struct AttentionKernel<Isa::DRIFTAR_ISA, double>;
template struct AttentionKernel<Isa::DRIFTAR_ISA, c10::BFloat16>;
template struct AttentionKernel<Isa::DRIFTAR_ISA, c10::Half>;

}  // namespace driftar::cpu
