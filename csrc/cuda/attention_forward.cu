// Attention with row entropies: the pass over the keys, and the merge of its splits.

#include "attention_store.cuh"

namespace driftar::cuda {

namespace {

// A block takes kQueryRows packed queries of a key head, 16 a warp, and a split of the keys. While
// scores are computed, kStages tiles of values are in flight or in use, while outputs are
// accumulated, kStages of keys. Shared memory: queries [kQueryRows], keys and values [kStages,
// columns].
template <typename T, int width>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    forward_kernel(const AttentionForward call) {
  constexpr int kColumns = key_columns(width, sizeof(T)), kFragments = kColumns / 8;
  constexpr int kStride = kSharedStride<T, width>, kStages = key_stages(width, sizeof(T));
  constexpr int kTile = kColumns * kStride;
  using Product = WarpProduct<T, width, kFragments>;
  const int64_t group = call.query_heads / call.key_heads, packed = group * call.query_length;
  const int64_t row_blocks = blocks_of(packed, kQueryRows);
  // The last rows see most if causal, so they start first.
  const int64_t first = (row_blocks - 1 - blockIdx.x % row_blocks) * kQueryRows;
  const int64_t key_head = blockIdx.x / row_blocks % call.key_heads;
  const int64_t b = blockIdx.x / row_blocks / call.key_heads % call.batch;
  const int64_t split = blockIdx.x / row_blocks / call.key_heads / call.batch;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const Sample sample(call, b);

  auto* queries = static_cast<T*>(shared_memory());
  T* keys = queries + kQueryRows * kStride;
  T* values = keys + kStages * kTile;
  const int last_query = static_cast<int>((min(first + kQueryRows, packed) - 1) / group);
  const int begin = static_cast<int>(split) * call.split_keys;
  const int end = min(begin + call.split_keys, sample.key_end(last_query));
  load_rows<T, width, kQueryRows>(queries, call.query, call.width, [&](int r) {
    const int64_t at = first + r, head = key_head * group + at % group;
    return at < packed ? b * call.query.batch + head * call.query.head + at / group * call.query.row
                       : int64_t{-1};
  });
  const auto load = [&](T* ring, const Operand& from, int columns, int tile) {
    const int start = begin + tile * kColumns;
    if (start < end) {
      T* target = ring + tile % kStages * kTile;
      load_rows<T, width, kColumns>(target, from, columns, [&](int r) {
        return start + r < end ? b * from.batch + key_head * from.head +
                                     static_cast<int64_t>(start + r) * from.row
                               : int64_t{-1};
      });
    }
    ptx::commit_copies();
  };
  load(keys, call.key, call.width, 0);
  for (int tile = 1; tile < kStages; ++tile) {
    load(values, call.value, call.value_width, tile - 1);
    load(keys, call.key, call.width, tile);
  }

  Row rows[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t at = first + warp * 16 + g + 8 * i;
    rows[i] = sample.row(static_cast<int>(at / group),
                         static_cast<int>(key_head * group + at % group), at < packed);
  }
  const int least_bound = sample.bound(static_cast<int>(first / group));
  const bool plain = call.mask.kind == MaskKind::none && call.ancestors == nullptr;
  const bool separate = call.entropy != EntropyKind::none && call.entropy_from > 0;
  Statistics all[2], members[2];
  float support[2] = {};
  float out[width / 8][4] = {};
  for (int tile = 0, start = begin; start < end; ++tile, start += kColumns) {
    const int stage = tile % kStages * kTile;
    ptx::wait_copies<2 * kStages - 2>();
    __syncthreads();  // the keys are there, and nobody reads the last values any more
    load(values, call.value, call.value_width, tile + kStages - 1);
    float scores[kFragments][4] = {};
    Product::scores(queries + warp * 16 * kStride, keys + stage, scores);
    const bool whole = plain && start + kColumns <= least_bound;
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = start + n * 8 + 2 * t + i % 2;
        scores[n][i] =
            whole ? scores[n][i] * call.scale : sample.score(rows[i / 2], j, scores[n][i]);
      }
    }
    ptx::wait_copies<2 * kStages - 2>();
    __syncthreads();  // the values are there, and nobody reads these keys any more
    load(keys, call.key, call.width, tile + kStages);

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = all[r].maximum, largest_member = members[r].maximum;
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float score = scores[n][2 * r + c];
          largest = fmaxf(largest, score);
          if (separate && start + n * 8 + 2 * t + c >= call.entropy_from) {
            largest_member = fmaxf(largest_member, score);
          }
        }
      }
      const auto larger = [](float a, float b) { return fmaxf(a, b); };
      const float factor = all[r].raise(row_reduce(largest, larger));
#pragma unroll
      for (int n = 0; n < width / 8; ++n) {
        out[n][2 * r] *= factor;
        out[n][2 * r + 1] *= factor;
      }
      if (separate) members[r].raise(row_reduce(largest_member, larger));
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[n][2 * r + c];
          const bool member = start + n * 8 + 2 * t + c >= call.entropy_from;
          if (member && score != -INFINITY) support[r] += 1;
          if (separate && member) members[r].add(score);
          score = all[r].add(score);
        }
      }
    }
    Product::outputs(scores, values + stage, out);
  }
  ptx::wait_copies<0>();

  const int64_t total_rows = call.batch * call.query_heads * call.query_length;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Each lane has summed its own columns.
    all[r].total = row_sum(all[r].total), all[r].moment = row_sum(all[r].moment);
    members[r].total = row_sum(members[r].total), members[r].moment = row_sum(members[r].moment);
    support[r] = row_sum(support[r]);
    if (!separate) members[r] = all[r];
    if (!rows[r].there) continue;
    const int64_t index = (b * call.query_heads + rows[r].head) * call.query_length + rows[r].query;
    if (t == 0) store_split(call, split, index, all[r], members[r], support[r]);
    const float divisor = call.splits > 1 || all[r].total == 0 ? 1.0f : all[r].total;
#pragma unroll
    for (int n = 0; n < width / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * t + c;
        if (column >= call.value_width) continue;
        const float value = out[n][2 * r + c] / divisor;
        const int64_t at = index * call.value_width + column;
        if (call.splits > 1) {
          call.partial_out[split * total_rows * call.value_width + at] = value;
        } else {
          static_cast<T*>(call.out)[at] = narrow<T>(value);
        }
      }
    }
  }
}

// A warp merges the splits of a row, in order.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, 2) merge_kernel(const AttentionForward call) {
  const int64_t total_rows = call.batch * call.query_heads * call.query_length;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (index >= total_rows) return;
  const auto part = [&](int split, int statistic) {
    return call.partial[(split * kStatistics + statistic) * total_rows + index];
  };
  Statistics all, members;
  float support = 0;
  for (int split = 0; split < call.splits; ++split) {
    all.join({part(split, 0), part(split, 1), part(split, 2)});
    members.join({part(split, 3), part(split, 4), part(split, 5)});
    support += part(split, 6);
  }
  if (lane == 0) store_row(call, index, all, members, support);
  const float divisor = all.total == 0 ? 1.0f : all.total;
  for (int column = lane; column < call.value_width; column += kWarp) {
    float sum = 0;
    for (int split = 0; split < call.splits; ++split) {
      Statistics own{part(split, 0)};
      const int64_t at = (split * total_rows + index) * call.value_width + column;
      sum += own.raise(all.maximum) * call.partial_out[at];
    }
    static_cast<T*>(call.out)[index * call.value_width + column] = narrow<T>(sum / divisor);
  }
}

// A thread packs the bits of a node: itself and its ancestors.
__global__ void __launch_bounds__(kAttentionThreads, 2) ancestor_kernel(const AncestorCall call) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (at >= call.trees * call.nodes) return;
  const int64_t words = (call.nodes + 31) / 32, tree = at / call.nodes;
  uint32_t* bits = call.bits + at * words;
  for (int64_t word = 0; word < words; ++word) bits[word] = 0;
  int64_t node = at % call.nodes;
  while (node >= 0) {
    bits[node / 32] |= 1u << (node % 32);
    const int64_t parent = call.parents[tree * call.nodes + node];
    node = parent < node ? parent : -1;  // parents precede their children
  }
}

}  // namespace

cudaError_t launch_ancestors(const AncestorCall& call, cudaStream_t stream) {
  return launch(ancestor_kernel,
                {blocks_of(call.trees * call.nodes, kAttentionThreads), kAttentionThreads}, stream,
                call);
}

cudaError_t launch_attention_forward(const AttentionForward& call, cudaStream_t stream) {
  return dispatch(call.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_width<T>(max(call.width, call.value_width), [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      constexpr size_t kShared =
          forward_shared_bytes(kWidth, sizeof(T), key_stages(kWidth, sizeof(T)));
      return launch(forward_kernel<T, kWidth>,
                    {query_blocks(call) * call.splits, kAttentionThreads, kShared}, stream, call);
    });
  });
}

cudaError_t launch_attention_merge(const AttentionForward& call, cudaStream_t stream) {
  const int64_t rows = call.batch * call.query_heads * call.query_length;
  return dispatch(call.type, [&](auto tag) {
    return launch(merge_kernel<typename decltype(tag)::type>,
                  {blocks_of(rows, kAttentionThreads / kWarp), kAttentionThreads}, stream, call);
  });
}

}  // namespace driftar::cuda
