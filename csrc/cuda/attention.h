#pragma once

// Attention with row entropies on the GPU as its launchers see it. Formulas: docs/ops/attention.md.

#include "../common/attention_kinds.h"
#include "attention_plan.h"
#include "scalar.h"

#include <cuda_runtime.h>

#include <cstdint>

namespace driftar::cuda {

enum class MaskKind { none, boolean, additive };

constexpr int kMaxWidth = 256;
constexpr int64_t kMaxLength = int64_t{1} << 29;  // of queries and keys
// Statistics that a split of the keys leaves per row: (m, l, t) over all keys and over E, and |E|.
constexpr int kStatistics = 7;

// [B, H, L, D]; strides in elements. `vectors`: rows can be copied 16 aligned bytes at a time.
struct Operand {
  const void* data;
  int64_t batch, head, row, column;
  bool vectors;
};

struct Mask {
  MaskKind kind;
  const void* data;  // [B, Hq, Lq, Lk] of bool (a byte) or fp32
  int64_t batch, head, row, column;
};

// What query i of sample b may see: keys j < key_length[b], if causal also j <= i +
// query_offset[b]; with a tree the prefix j < key_length[b] and, behind it, the node's ancestors
// and itself. Lengths and offsets are clamped by the kernels.
struct AttentionShape {
  Scalar type;
  EntropyKind entropy;
  bool is_causal;
  int width, value_width, query_length, key_length, query_offset, entropy_from;
  int64_t batch, query_heads, key_heads;
  float scale;
  Operand query, key, value;
  const int64_t *query_offsets, *key_lengths;  // [B], or null
  const uint32_t* ancestors;                   // bits [B | 1, N, words], or null without a tree
  int64_t ancestors_stride;                    // 0 when one tree serves the batch
  int words;
  Mask mask;
};

struct AttentionForward : AttentionShape {
  bool normalize;
  void* out;                          // [B, Hq, Lq, Dv]
  float *lse, *max_score;             // [B, Hq, Lq]
  float *entropy_out, *entropy_norm;  // [B, Hq, Lq] (head) or [B, Lq] (map)
  float* entropy_lse;                 // [B, Hq, Lq]: log-sum-exp over E
  float* entropy_cross;  // [B, Hq, Lq]: sum over E of p log pi; before the map pass |E|
  int splits;            // of the keys, each of split_keys
  int split_keys;
  float* partial_out;  // [splits, B, Hq, Lq, Dv], if there are several
  float* partial;      // [splits, kStatistics, B, Hq, Lq]
};

struct AttentionBackward : AttentionShape {
  Operand grad_out;                          // [B, Hq, Lq, Dv]
  const void* out;                           // [B, Hq, Lq, Dv]
  const float *lse, *grad_lse;               // [B, Hq, Lq]
  const float *entropy_lse, *entropy_cross;  // [B, Hq, Lq]
  const float* entropy_weight;  // gradient of the entropy times entropy_norm, [B, Hq, Lq] (head) or
                                // [B, Lq] (map)
  float* delta;                 // [B, Hq, Lq], scratch
  void *grad_query, *grad_key, *grad_value;  // [B, Hq, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv]
};

struct AncestorCall {
  int64_t trees, nodes;
  const int64_t* parents;  // [trees, N]
  uint32_t* bits;          // [trees, N, words]
};

inline int64_t ancestor_words(int64_t nodes) { return (nodes + 31) / 32; }

inline int64_t query_blocks(const AttentionShape& shape) {
  const int64_t packed = shape.query_heads / shape.key_heads * shape.query_length;
  return shape.batch * shape.key_heads * ((packed + kQueryRows - 1) / kQueryRows);
}

cudaError_t launch_ancestors(const AncestorCall& call, cudaStream_t stream);
cudaError_t launch_attention_forward(const AttentionForward& call, cudaStream_t stream);
cudaError_t launch_attention_merge(const AttentionForward& call, cudaStream_t stream);
cudaError_t launch_attention_map(const AttentionForward& call, cudaStream_t stream);
cudaError_t launch_attention_backward(const AttentionBackward& call, cudaStream_t stream);

}  // namespace driftar::cuda
