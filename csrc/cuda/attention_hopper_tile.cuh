#pragma once

// Tiles of attention on Hopper: shared memory and its barriers, a block's share of the work, row
// statistics.

#include "attention_forward_plan.h"
#include "attention_tile.cuh"
#include "ptx_hopper.cuh"
#include "tensor_map.h"

namespace driftar::cuda {

constexpr int kWarpgroup = 128, kConsumers = kHopperRows / 64;
constexpr int kHopperThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kSwizzlePeriod = 1024;
// Registers of a thread: the copying warpgroup leaves what two others share, 64 Ki in all.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr float kLn2 = 0.6931471805599453f;

struct HopperCall {
  AttentionForward forward;
  CUtensorMap query, key, value;
};

// Shared memory; stages of keys and values go round. A phase of `full` ends when the tile is there,
// one of `empty` when every consuming warp has left it.
template <int width>
struct Tiles {
  static constexpr int kPanels = width / kPanel, kStages = width == 64 ? 4 : 2;
  using Keys = uint16_t[kPanels][kHopperColumns][kPanel];

  uint16_t queries[kPanels][kHopperRows][kPanel];
  Keys keys[kStages], values[kStages];
  uint64_t queries_full, tail_full;
  uint64_t keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];

  static constexpr size_t kBytes = sizeof(queries) + sizeof(keys) + sizeof(values) +
                                   sizeof(uint64_t) * (2 + 4 * kStages) + kSwizzlePeriod;

  static __device__ __forceinline__ Tiles& of_block() {
    auto* start = static_cast<char*>(shared_memory());
    start += -ptx::shared_address(start) & (kSwizzlePeriod - 1);
    return *reinterpret_cast<Tiles*>(start);
  }

  __device__ __forceinline__ void initialize() {
    ptx::init_barrier(&queries_full, 1), ptx::init_barrier(&tail_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::init_barrier(&keys_full[stage], 1), ptx::init_barrier(&values_full[stage], 1);
      constexpr int kReaders = kConsumers * kWarpgroup / kWarp;
      ptx::init_barrier(&keys_empty[stage], kReaders);
      ptx::init_barrier(&values_empty[stage], kReaders);
    }
    ptx::publish_barriers();
    ptx::fence_async_proxy();
  }
};

// Which rows a block takes, and which keys: tiles in descending order, so that those that some rows
// do not see whole come first, and those before entropy_from last.
struct Work {
  int group, rows, first_query, key_head, b, split, begin, tiles;

  __device__ explicit Work(const AttentionForward& call) {
    group = static_cast<int>(call.query_heads / call.key_heads);
    const int queries = kHopperRows / group;
    rows = group * queries;
    const auto row_blocks = static_cast<unsigned>(blocks_of(call.query_length, queries));
    const auto key_heads = static_cast<unsigned>(call.key_heads);
    const auto batch = static_cast<unsigned>(call.batch);
    // The last rows see most if causal, so they start first.
    first_query = static_cast<int>(row_blocks - 1 - blockIdx.x % row_blocks) * queries;
    key_head = static_cast<int>(blockIdx.x / row_blocks % key_heads);
    b = static_cast<int>(blockIdx.x / row_blocks / key_heads % batch);
    split = static_cast<int>(blockIdx.x / row_blocks / key_heads / batch);
  }

  __device__ void limit(const AttentionForward& call, const Sample& sample) {
    const int last = min(first_query + rows / group, call.query_length) - 1;
    begin = split * call.split_keys;
    const int end = min(begin + call.split_keys, sample.key_end(last));
    tiles = max(0, (end - begin + kHopperColumns - 1) / kHopperColumns);
  }

  __device__ int start(int tile) const { return begin + (tiles - 1 - tile) * kHopperColumns; }
};

// The stage of a tile, and the parity of its round.
template <int stages>
struct Stage {
  int index;
  uint32_t parity;
  __device__ explicit Stage(int tile) : index(tile % stages), parity(tile / stages & 1) {}
};

// (m, l, t) of Statistics in powers of two, which saves a multiplication per score: with products
// s, unit = scale log2 e and reference r = unit m, total = sum 2^y and moment = sum 2^y y for y =
// unit s - r.
struct Sums {
  float largest = -INFINITY, reference = 0, total = 0, moment = 0;

  __device__ __forceinline__ float add(float product, float unit) {
    const float y = fmaf(product, unit, -reference);
    const float weight = ptx::exp2(y);
    total += weight;
    moment = fmaf(weight, fmaxf(y, kFarBelow), moment);
    return weight;
  }

  // Re-expresses the sums relative to a new, not smaller maximum; returns their factor.
  __device__ __forceinline__ float raise(float new_largest, float unit) {
    const float new_reference = Statistics::shift(new_largest) * unit;
    const float y = reference - new_reference;
    const float factor = largest == -INFINITY ? 0.0f : ptx::exp2(y);
    moment = factor * fmaf(fmaxf(y, kFarBelow), total, moment);
    total *= factor;
    largest = new_largest, reference = new_reference;
    return factor;
  }

  // Of the whole row: each of four lanes has summed its own columns.
  __device__ __forceinline__ Statistics joined(float scale) const {
    return {largest * scale, row_sum(total), row_sum(moment) * kLn2};
  }
};

}  // namespace driftar::cuda
