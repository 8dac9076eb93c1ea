#pragma once

// Attention on the CPU as its kernel sees it: raw pointers, strides and sizes.

#include "../common/accumulate.h"
#include "isa.h"

#include <cstdint>

namespace driftar::cpu {

enum class EntropyKind { none, head, map };

// One operand [B, H, L, D]; strides in elements.
template <typename T>
struct Operand {
  T* data;
  int64_t batch, head, row, column;

  T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

// What query i of sample b may see: keys j < key_length[b], with is_causal also j <= i +
// query_offset[b]; with a tree the prefix j < key_length[b] and, behind it, the node's ancestors
// and itself.
struct Visibility {
  const int64_t* key_length;    // [B]
  const int64_t* query_offset;  // [B], clamped to [-Lq - 1, Lk]
  bool is_causal;
  const uint64_t* ancestors;  // bit rows [B | 1, N, words], or null without a tree
  int64_t ancestors_batch;    // 0 when one tree serves the batch
  const void* mask;           // bool (one byte) or accumulation type, or null
  bool mask_is_bool;
  int64_t mask_batch, mask_head, mask_row, mask_column;
};

template <typename scalar_t>
struct AttentionShape {
  using acc_t = accumulate_t<scalar_t>;
  int64_t batch, query_heads, key_heads, query_length, key_length, width, value_width;
  acc_t scale;
  EntropyKind entropy;
  int64_t entropy_from;
  Operand<const scalar_t> query, key, value;
  Visibility visibility;
};

template <typename scalar_t>
struct AttentionForward : AttentionShape<scalar_t> {
  using acc_t = accumulate_t<scalar_t>;
  bool normalize;
  scalar_t* out;         // [B, Hq, Lq, Dv]
  acc_t* lse;            // [B, Hq, Lq]
  acc_t* max_score;      // [B, Hq, Lq]
  acc_t* entropy_out;    // [B, Hq, Lq] (head) or [B, Lq] (map)
  acc_t* entropy_norm;   // like entropy_out: the factor 1, 1 / log |E| or 0 applied to the entropy
  acc_t* entropy_lse;    // [B, Hq, Lq]: log-sum-exp over E
  acc_t* entropy_cross;  // [B, Hq, Lq]: sum over E of p log pi; pi = p (head) or the head average
                         // (map)
};

template <typename scalar_t>
struct AttentionBackward : AttentionShape<scalar_t> {
  using acc_t = accumulate_t<scalar_t>;
  const acc_t* lse;            // [B, Hq, Lq]
  const acc_t* entropy_lse;    // [B, Hq, Lq]
  const acc_t* entropy_cross;  // [B, Hq, Lq]
  const acc_t*
      entropy_weight;  // gradient of the entropy times entropy_norm: [B, Hq, Lq] or [B, Lq]
  const acc_t* delta;  // [B, Hq, Lq]: <grad_out, out> - grad_lse
  Operand<const scalar_t> grad_out;
  scalar_t* grad_query;  // [B, Hq, Lq, D]
  acc_t* grad_key;       // [splits, B, Hkv, Lk, D], zero-initialised
  acc_t* grad_value;     // [splits, B, Hkv, Lk, Dv], zero-initialised
  int64_t splits;        // query blocks are dealt out to this many accumulators
};

// Queries and keys per block.
constexpr int64_t kQueryBlock = 64;
constexpr int64_t kKeyBlock = 128;
// The entropy of the head-averaged map holds one tile of every head at once.
constexpr int64_t kMapQueryBlock = 32;
constexpr int64_t kMapKeyBlock = 64;

inline int64_t blocks(int64_t length, int64_t block) { return (length + block - 1) / block; }

// Scratch of one thread, in elements of the accumulation type.
template <typename scalar_t>
int64_t forward_scratch(const AttentionShape<scalar_t>& shape) {
  const int64_t rows =
      shape.width * (kQueryBlock + kKeyBlock) + shape.value_width * (kQueryBlock + kKeyBlock);
  return rows + (kQueryBlock + 1) * kKeyBlock;
}

template <typename scalar_t>
int64_t map_scratch(const AttentionShape<scalar_t>& shape) {
  const int64_t tiles = (shape.query_heads + 1) * kMapQueryBlock * kMapKeyBlock;
  return shape.width * (kMapQueryBlock + kMapKeyBlock) + tiles + kMapKeyBlock;
}

template <typename scalar_t>
int64_t backward_scratch(const AttentionShape<scalar_t>& shape) {
  const bool map = shape.entropy == EntropyKind::map;
  const int64_t heads = map ? shape.query_heads : 1;
  const int64_t rows = map ? kMapQueryBlock : kQueryBlock;
  const int64_t columns = map ? kMapKeyBlock : kKeyBlock;
  const int64_t queries = heads * rows * (2 * shape.width + shape.value_width);
  const int64_t keys = columns * (shape.width + shape.value_width);
  return queries + keys + (heads + 2) * rows * columns + columns;
}

// The kernels of one instruction set and dtype. `memory` is the thread's scratch.
template <Isa isa, typename scalar_t>
struct AttentionKernel {
  using acc_t = accumulate_t<scalar_t>;

  // task = (sample, query head, query block). Writes everything but the map entropies.
  static void forward(const AttentionForward<scalar_t>& call, int64_t task, acc_t* memory);

  // Second pass of entropy "map": task = (sample, query block of kMapQueryBlock).
  static void map_entropy(const AttentionForward<scalar_t>& call, int64_t task, acc_t* memory);

  // task = (split, sample, key head), or (split, sample) with entropy "map".
  static void backward(const AttentionBackward<scalar_t>& call, int64_t task, acc_t* memory);
};

}  // namespace driftar::cpu
