#pragma once

// Attention on the CPU as its kernel sees it: raw pointers, strides and sizes.

#include "../common/accumulate.h"
#include "../common/attention_kinds.h"
#include "isa.h"
#include "padding.h"

#include <algorithm>
#include <cstdint>

namespace driftar::cpu {

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

// How the queries are dealt out: blocks of `rows` queries of `heads` heads that share a key head.
struct QueryBlocking {
  int64_t rows, heads;
  int64_t row_blocks, head_blocks;  // head blocks of one key head
};

template <typename scalar_t>
struct AttentionForward : AttentionShape<scalar_t> {
  using acc_t = accumulate_t<scalar_t>;
  QueryBlocking blocking;
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
  const scalar_t* out;          // [B, Hq, Lq, Dv]
  const acc_t* lse;             // [B, Hq, Lq]
  const acc_t* entropy_lse;     // [B, Hq, Lq]
  const acc_t* entropy_cross;   // [B, Hq, Lq]
  const acc_t* entropy_weight;  // gradient of the entropy times entropy_norm: [B, Hq, Lq] (head) or
                                // [B, Lq] (map)
  const acc_t* grad_lse;        // [B, Hq, Lq]
  acc_t* delta;                 // [B, Hq, Lq]: <grad_out, out> - grad_lse
  Operand<const scalar_t> grad_out;
  scalar_t* grad_query;  // [B, Hq, Lq, D]
  scalar_t* grad_key;    // [B, Hkv, Lk, D]
  scalar_t* grad_value;  // [B, Hkv, Lk, Dv]
  int64_t splits;        // tasks that share the keys of a head
};

// Keys per block.
constexpr int64_t kKeyBlock = 256;
// Keys of a block that a group of many queries takes at a time: its scores, its weights and its
// sums of values stay in the first-level cache, past which the keys stream. Fewer on tiles.
constexpr int64_t kStepKeys = 128;
constexpr int64_t kTileStepKeys = 64;
// Up to so many queries gather products with every key apart.
constexpr int64_t kDotRows = 2;
// Keys per block of as few queries as one matrix product takes, which looks at the values twice: in
// the first-level cache.
constexpr int64_t kFewKeyBlock = 128;
// Queries per block: at most, since the keys are read anew for every block. As few as give every
// thread several blocks, down to the second number; fewer only for threads that would have none.
constexpr int64_t kQueryBlock = 512;
constexpr int64_t kMinQueryBlock = 64;
// Blocks of the backward pass, whose tiles of scores and of their gradients stay in the L2 cache.
constexpr int64_t kBackwardQueryBlock = 64;
constexpr int64_t kBackwardKeyBlock = 128;
// The same on AMX.
constexpr int64_t kTileQueryBlock = 128;
constexpr int64_t kTileKeyBlock = 256;
// Rows that a matrix product takes together, at most.
constexpr int64_t kMaxGemmRows = 8;
// Of long rows, the entropy of the head-averaged map holds one tile of every head at once.
constexpr int64_t kMapQueryBlock = 64;
constexpr int64_t kMapKeyBlock = 64;
constexpr int64_t kMapTile = kMapQueryBlock * kMapKeyBlock;
static_assert(kMapQueryBlock <= kBackwardQueryBlock);
// One pass makes that map where rows are at most so long and a group of queries of every head, so
// many scores in all, stays in the L2 cache.
constexpr int64_t kMapKeptKeys = 1024;
constexpr int64_t kMapKept = 3 << 17;

inline int64_t blocks(int64_t length, int64_t block) { return (length + block - 1) / block; }

// Tasks of AttentionKernel::forward.
template <typename scalar_t>
int64_t forward_tasks(const AttentionShape<scalar_t>& shape, const QueryBlocking& blocking) {
  return shape.batch * shape.key_heads * blocking.head_blocks * blocking.row_blocks;
}

template <typename scalar_t>
QueryBlocking query_blocking(const AttentionShape<scalar_t>& shape, int64_t threads) {
  const int64_t group = shape.query_heads / shape.key_heads;
  QueryBlocking result{};
  for (int64_t most = kQueryBlock; most >= kMaxGemmRows; most /= 2) {
    result.rows = std::min(shape.query_length, most);
    result.heads = std::clamp<int64_t>(most / result.rows, 1, group);
    result.row_blocks = blocks(shape.query_length, result.rows);
    result.head_blocks = blocks(group, result.heads);
    if (forward_tasks(shape, result) >= (most > kMinQueryBlock ? 4 : 1) * threads) break;
  }
  return result;
}

// `keys` filled up to whole panels of the matrix products.
template <typename scalar_t>
int64_t whole_panels(int64_t keys) {
  constexpr int64_t panel = 2 * padding<accumulate_t<scalar_t>>;
  return std::max<int64_t>(blocks(keys, panel), 1) * panel;
}

template <typename scalar_t>
int64_t forward_key_block(const AttentionForward<scalar_t>& call) {
  const int64_t rows = call.blocking.rows * call.blocking.heads;
  const bool few = rows > kDotRows && rows <= kMaxGemmRows;
  return std::min(whole_panels<scalar_t>(call.key_length), few ? kFewKeyBlock : kKeyBlock);
}

// The queries of a task that makes the head-averaged map in one pass, keeping the scores of all
// heads; 0 where there are too many for the cache.
template <typename scalar_t>
QueryBlocking map_blocking(const AttentionShape<scalar_t>& shape) {
  QueryBlocking result{};
  const int64_t stride = whole_panels<scalar_t>(shape.key_length);
  if (stride > kMapKeptKeys) return result;
  constexpr int64_t group = 2 * padding<accumulate_t<scalar_t>>;
  const int64_t most = std::min(kMapKept / (shape.query_heads * stride), kMapQueryBlock);
  result.rows = std::min(shape.query_length, most / group * group);
  result.heads = 1;
  result.row_blocks = result.rows == 0 ? 0 : blocks(shape.query_length, result.rows);
  return result;
}

// `rows` in groups of which any instruction set fills two vectors, with one more.
template <typename scalar_t>
int64_t whole_groups_and_one(int64_t rows) {
  constexpr int64_t group = 2 * padding<accumulate_t<scalar_t>>;
  return (blocks(rows, group) + 1) * group;
}

// Scratch of one thread, in elements of the accumulation type.
template <typename scalar_t>
int64_t forward_scratch(const AttentionForward<scalar_t>& call, int64_t rows, int64_t keys) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t lanes = padding<acc_t>, group = 2 * lanes;
  // Rows are kept as they are where they multiply so, which pads them to more elements.
  const int64_t width = padded<scalar_t>(call.width);
  const int64_t value_width = padded<scalar_t>(call.value_width);
  // Products of bf16 take values and weights a second time, in pairs.
  const bool narrow = sizeof(scalar_t) < sizeof(acc_t);
  const bool selected = call.visibility.mask != nullptr || call.visibility.ancestors != nullptr;
  const int64_t written = whole_groups_and_one<scalar_t>(rows);
  const int64_t loaded = rows * width + keys * (width + value_width);
  const int64_t packed = std::max(written, 4 * kMaxGemmRows) * width + keys * value_width;
  const int64_t statistics = std::max(10 * written, 2 * rows * lanes);
  const int64_t strip_rows = selected ? 3 * group : group;
  return loaded + packed + written * value_width + statistics +
         (strip_rows + (narrow ? group : 0)) * (keys + lanes);
}

template <typename scalar_t>
int64_t map_forward_scratch(const AttentionForward<scalar_t>& call) {
  const int64_t stride = whole_panels<scalar_t>(call.key_length), rows = call.blocking.rows;
  const int64_t kept = call.query_heads * whole_groups_and_one<scalar_t>(rows);
  return kept * (stride + 2) + forward_scratch(call, rows, stride);
}

template <typename scalar_t>
int64_t map_entropy_scratch(const AttentionShape<scalar_t>& shape) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t loaded = (kMapQueryBlock + kMapKeyBlock) * padded<scalar_t>(shape.width);
  return loaded + padded<acc_t>(kMapKeyBlock * shape.width) + (shape.query_heads + 1) * kMapTile;
}

// Whether the backward pass multiplies on tiles.
template <Isa isa, typename scalar_t>
bool differentiates_tiles(const AttentionShape<scalar_t>& shape) {
  return isa == Isa::amx && shape.entropy != EntropyKind::map;
}

// Blocks of the backward pass.
struct BackwardBlocks {
  int64_t queries, keys;

  template <typename scalar_t>
  BackwardBlocks(const AttentionShape<scalar_t>& shape, bool tiles) {
    const bool map = shape.entropy == EntropyKind::map;
    queries = tiles ? kTileQueryBlock : map ? kMapQueryBlock : kBackwardQueryBlock;
    keys = tiles ? kTileKeyBlock : map ? kMapKeyBlock : kBackwardKeyBlock;
  }

  int64_t tile() const { return queries * keys; }
};

// Gradients of the queries of `heads` heads, in the accumulation type. Tiles keep those of groups
// of queries.
template <typename scalar_t>
int64_t gathered_size(const AttentionShape<scalar_t>& shape, int64_t heads, bool tiles) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t group = 2 * padding<acc_t>;
  if (!tiles) return heads * shape.query_length * padded<acc_t>(shape.width);
  return heads * blocks(shape.query_length, group) * group * padded<scalar_t>(shape.width);
}

template <typename scalar_t>
int64_t backward_scratch(const AttentionShape<scalar_t>& shape, bool tiles) {
  using acc_t = accumulate_t<scalar_t>;
  const bool map = shape.entropy == EntropyKind::map;
  const BackwardBlocks size(shape, tiles);
  const int64_t width = padded<scalar_t>(shape.width);
  const int64_t value_width = padded<scalar_t>(shape.value_width);
  if (tiles) {
    constexpr int64_t group = 2 * padding<acc_t>;
    return 2 * (size.keys + size.queries) * (width + value_width) + size.tile() +
           2 * size.keys * group + 4 * group * (kTileStepKeys + padding<acc_t>);
  }
  const int64_t loaded = size.queries * (width + value_width) + size.keys * value_width;
  // Products of bf16 take probabilities and gradients of scores a second time, rounded.
  const int64_t rounded = sizeof(scalar_t) < sizeof(acc_t) ? 2 : 0;
  const int64_t scores = ((map ? shape.query_heads : 1) + 2 + rounded) * size.tile();
  const int64_t part = 3 * size.keys * width + 2 * size.keys * value_width;
  return loaded + scores + (map ? shape.key_heads : 1) * part;
}

// The kernels of one instruction set and dtype. `memory` is the thread's scratch.
template <Isa isa, typename scalar_t>
struct AttentionKernel {
  using acc_t = accumulate_t<scalar_t>;

  // task = (sample, key head, head block, row block). Writes everything but the map entropies.
  static void forward(const AttentionForward<scalar_t>& call, int64_t task, acc_t* memory);

  // task = (sample, row block) of map_blocking. Writes everything.
  static void map_forward(const AttentionForward<scalar_t>& call, int64_t task, acc_t* memory);

  // Second pass of entropy "map": task = (sample, query block of kMapQueryBlock).
  static void map_entropy(const AttentionForward<scalar_t>& call, int64_t task, acc_t* memory);

  // task = (sample, query head): fills delta.
  static void row_deltas(const AttentionBackward<scalar_t>& call, int64_t task);

  // task = (split, sample, key head), or (split, sample) with entropy "map". Writes the gradients
  // of the keys and values of its tiles and adds those of the queries of its heads to
  // `grad_queries` of gathered_size().
  static void backward(const AttentionBackward<scalar_t>& call, int64_t task, acc_t* grad_queries,
                       acc_t* memory);

  // Writes the gradients of the queries of `heads` heads, the sum of `parts` accumulators.
  static void store_queries(const AttentionBackward<scalar_t>& call, int64_t b, int64_t head,
                            int64_t heads, acc_t* grad_queries, int64_t parts, int64_t part_stride);
};

}  // namespace driftar::cpu
