// The entropy of the head-averaged attention map, after the pass over the keys: pi_j = mean_h p_hj,
// p_h softmax over E; cross_h = sum_j p_hj log pi_j and the entropy -mean_h cross_h.

#include "attention_tile.cuh"

namespace driftar::cuda {

namespace {

// A block takes kQueryRows queries of a sample, 16 a warp, and looks at every tile of keys twice
// for every head. A lane that owns a row (t = 0) keeps its cross_h in global memory. Shared
// memory: queries [kQueryRows] and keys [columns] of one head.
template <typename T, int width>
__global__ void __launch_bounds__(kAttentionThreads, 2) map_kernel(const AttentionForward call) {
  constexpr int kColumns = key_columns(width, sizeof(T)), kFragments = kColumns / 8;
  constexpr int kStride = kSharedStride<T, width>;
  const int64_t blocks = blocks_of(call.query_length, kQueryRows);
  const int first = static_cast<int>(blockIdx.x % blocks) * kQueryRows;
  const int64_t b = blockIdx.x / blocks;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int64_t group = call.query_heads / call.key_heads;
  const Sample sample(call, b);
  auto* queries = static_cast<T*>(shared_memory());
  T* keys = queries + kQueryRows * kStride;

  const int own[2] = {first + warp * 16 + g, first + warp * 16 + g + 8};
  const auto is_there = [&](int r) { return own[r] < call.query_length; };
  const auto index = [&](int64_t head, int r) {
    return (b * call.query_heads + head) * call.query_length + own[r];
  };
  float support[2] = {};
  for (int r = 0; r < 2; ++r) {
    if (!is_there(r) || t != 0) continue;
    for (int64_t head = 0; head < call.query_heads; ++head) {
      support[r] = fmaxf(support[r], call.entropy_cross[index(head, r)]);
      call.entropy_cross[index(head, r)] = 0;
    }
  }

  const int end = sample.key_end(min(first + kQueryRows, call.query_length) - 1);
  // visit(r, fragment, value, probability) for what this lane holds of a head's tile.
  const auto each_probability = [&](int64_t head, int start, auto&& visit) {
    __syncthreads();  // nobody reads the operands of the last head any more
    load_rows<T, width, kQueryRows>(queries, call.query, call.width, [&](int r) {
      return first + r < call.query_length ? b * call.query.batch + head * call.query.head +
                                                 static_cast<int64_t>(first + r) * call.query.row
                                           : int64_t{-1};
    });
    load_rows<T, width, kColumns>(keys, call.key, call.width, [&](int r) {
      return start + r < end ? b * call.key.batch + head / group * call.key.head +
                                   static_cast<int64_t>(start + r) * call.key.row
                             : int64_t{-1};
    });
    ptx::commit_copies();
    ptx::wait_copies<0>();
    __syncthreads();
    float scores[kFragments][4] = {};
    WarpProduct<T, width, kFragments>::scores(queries + warp * 16 * kStride, keys, scores);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Row row = sample.row(own[r], static_cast<int>(head), is_there(r));
      const float lse = is_there(r) ? call.entropy_lse[index(head, r)] : 0.0f;
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int j = start + n * 8 + 2 * t + c;
          const float score =
              j < call.entropy_from ? -INFINITY : sample.score(row, j, scores[n][2 * r + c]);
          visit(r, n, 2 * r + c, score == -INFINITY ? 0.0f : ptx::exp2((score - lse) * kLog2E));
        }
      }
    }
  };
  const float share = 1.0f / static_cast<float>(call.query_heads);
  for (int start = call.entropy_from / kColumns * kColumns; start < end; start += kColumns) {
    float logarithm[kFragments][4] = {};  // first the average, then its logarithm
    for (int64_t head = 0; head < call.query_heads; ++head) {
      each_probability(head, start, [&](int, int n, int i, float p) { logarithm[n][i] += p; });
    }
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = logarithm[n][i];
        value = value == 0 ? 0.0f : logf(value * share);
      }
    }
    for (int64_t head = 0; head < call.query_heads; ++head) {
      float cross[2] = {};
      each_probability(head, start,
                       [&](int r, int n, int i, float p) { cross[r] += p * logarithm[n][i]; });
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = row_sum(cross[r]);
        if (t == 0 && is_there(r)) call.entropy_cross[index(head, r)] += sum;
      }
    }
  }

  for (int r = 0; r < 2; ++r) {
    if (!is_there(r) || t != 0) continue;
    float entropy = 0;
    for (int64_t head = 0; head < call.query_heads; ++head) {
      entropy -= call.entropy_cross[index(head, r)] * share;
    }
    const float norm = entropy_norm(support[r], call.normalize);
    const int64_t at = b * call.query_length + own[r];
    call.entropy_out[at] = (entropy < 0 ? 0.0f : entropy) * norm;
    call.entropy_norm[at] = norm;
  }
}

}  // namespace

cudaError_t launch_attention_map(const AttentionForward& call, cudaStream_t stream) {
  const int64_t blocks = call.batch * blocks_of(call.query_length, kQueryRows);
  return dispatch(call.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_width<T>(call.width, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      constexpr size_t kShared =
          sizeof(T) * (kQueryRows + key_columns(kWidth, sizeof(T))) * kSharedStride<T, kWidth>;
      return launch(map_kernel<T, kWidth>, {blocks, kAttentionThreads, kShared}, stream, call);
    });
  });
}

}  // namespace driftar::cuda
