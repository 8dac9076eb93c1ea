#pragma once

// What the pass over the keys leaves behind for a row.

#include "attention_tile.cuh"

namespace driftar::cuda {

// Writes the statistics of a finished row; `index` is its place in [B, Hq, Lq].
__device__ inline void store_row(const AttentionForward& call, int64_t index, const Statistics& all,
                                 const Statistics& members, float support) {
  call.lse[index] = all.lse();
  call.max_score[index] = all.largest();
  if (call.entropy == EntropyKind::none) return;
  call.entropy_lse[index] = members.lse();
  if (call.entropy == EntropyKind::map) {
    call.entropy_cross[index] = support;
    return;
  }
  const float entropy = members.entropy(), norm = entropy_norm(support, call.normalize);
  call.entropy_out[index] = entropy * norm;
  call.entropy_norm[index] = norm;
  call.entropy_cross[index] = -entropy;
}

// The same for a row of one split of the keys, which the merge finishes if there are several.
__device__ inline void store_split(const AttentionForward& call, int64_t split, int64_t index,
                                   const Statistics& all, const Statistics& members,
                                   float support) {
  if (call.splits == 1) return store_row(call, index, all, members, support);
  const float left[kStatistics] = {all.maximum,   all.total,      all.moment, members.maximum,
                                   members.total, members.moment, support};
  const int64_t rows = call.batch * call.query_heads * call.query_length;
#pragma unroll
  for (int i = 0; i < kStatistics; ++i) {
    call.partial[(split * kStatistics + i) * rows + index] = left[i];
  }
}

}  // namespace driftar::cuda
