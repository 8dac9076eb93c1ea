// Attention with row entropies on Hopper (sm_90a): one warp has tiles copied in bulk, two
// warpgroups multiply by wgmma and take turns, so that one's exponentials run beside the other's
// products.

#include "attention_plan.h"
#include "attention_store.cuh"
#include "ptx_hopper.cuh"

namespace driftar::cuda {

namespace {

constexpr int kWarpgroup = 128, kConsumers = kHopperRows / 64;
constexpr int kHopperThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kPanel = 64;  // columns of 16 bits in a swizzled row of 128 bytes
constexpr int kSwizzlePeriod = 1024;
// Registers of a thread: the copying warpgroup leaves what two others share, 64 Ki in all.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr float kLn2 = 0.6931471805599453f;

struct HopperCall {
  AttentionForward forward;
  // Coordinates: column, query head of a key head, row, key head, sample.
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

// One warp: has queries, keys and values copied. Keys behind the last are zeros, behind a sample's
// length they are whatever the tensor holds: scores hide it, but values would spread NaN.
template <int width>
__device__ void produce(const HopperCall& call, Tiles<width>& tiles, const Work& work, int length) {
  using Keys = typename Tiles<width>::Keys;
  constexpr int kPanels = Tiles<width>::kPanels;
  const bool leads = threadIdx.x == 0;
  const auto copy = [&](Keys& target, const CUtensorMap& tensor, uint64_t* full, int tile) {
    ptx::arrive_expecting(full, sizeof(Keys));
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::copy_tile(target[panel], tensor, full, panel * kPanel, 0, work.start(tile),
                     work.key_head, work.b);
    }
  };
  if (leads) {
    ptx::arrive_expecting(&tiles.queries_full, kPanels * work.rows * sizeof(tiles.queries[0][0]));
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::copy_tile(tiles.queries[panel], call.query, &tiles.queries_full, panel * kPanel, 0,
                     work.first_query, work.key_head, work.b);
    }
    copy(tiles.keys[0], call.key, &tiles.keys_full[0], 0);
  }
  const int valid = length - work.start(0);
  const bool tail = length < call.forward.key_length && valid < kHopperColumns;
  if (tail) {
    if (leads) copy(tiles.values[0], call.value, &tiles.tail_full, 0);
    ptx::wait(&tiles.tail_full, 0);
    constexpr int kWords = kPanel * sizeof(uint16_t) / sizeof(uint4);
    for (int panel = 0; panel < kPanels; ++panel) {
      auto* rows = reinterpret_cast<uint4*>(tiles.values[0][panel]);
      for (int at = valid * kWords + threadIdx.x; at < kHopperColumns * kWords; at += kWarp) {
        rows[at] = uint4{};
      }
    }
    ptx::fence_async_proxy();
    __syncwarp();
    if (leads) ptx::arrive(&tiles.values_full[0]);
  }
  if (!leads) return;
  for (int tile = 0; tile < work.tiles; ++tile) {
    const Stage<Tiles<width>::kStages> stage(tile);
    if (tile > 0) {
      ptx::wait(&tiles.keys_empty[stage.index], stage.parity ^ 1);
      copy(tiles.keys[stage.index], call.key, &tiles.keys_full[stage.index], tile);
    }
    if (tile > 0 || !tail) {
      ptx::wait(&tiles.values_empty[stage.index], stage.parity ^ 1);
      copy(tiles.values[stage.index], call.value, &tiles.values_full[stage.index], tile);
    }
  }
}

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

// A warpgroup: 64 rows of the block's tile, 16 a warp, two a lane.
template <typename T, int width>
class Consumer {
  static constexpr bool kIsBf16 = std::is_same_v<T, Bf16>;
  static constexpr int kStages = Tiles<width>::kStages, kFragments = kHopperColumns / 8;

 public:
  __device__ Consumer(const AttentionForward& call, Tiles<width>& tiles, const Work& work,
                      const Sample& sample)
      : call_(call), tiles_(tiles), work_(work), unit_(call.scale * kLog2E) {
    const int own = threadIdx.x - kWarpgroup;
    group_ = __shfl_sync(kWholeWarp, own / kWarpgroup, 0);
    t_ = own % 4;
    for (int r = 0; r < 2; ++r) {
      const int row = own / kWarp * 16 + own % kWarp / 4 + 8 * r;
      query_[r] = work.first_query + row / work.group;
      head_[r] = work.key_head * work.group + row % work.group;
      there_[r] = row < work.rows && query_[r] < call.query_length;
      bound_[r] = there_[r] ? sample.bound(query_[r]) : 0;
    }
    least_bound_ = sample.bound(work.first_query + group_ * 64 / work.group);
    separate_ = call.entropy != EntropyKind::none && call.entropy_from > 0;
    query_operand_ = ptx::operand(tiles.queries[0][group_ * 64], 0);
    key_operand_ = ptx::operand(tiles.keys, 0);
    value_operand_ = ptx::operand(tiles.values, sizeof(tiles.values[0][0]));
  }

  __device__ __forceinline__ void run() {
    constexpr int kBoth = kConsumers * kWarpgroup;
    const int own_turn = 1 + group_, other_turn = 2 - group_;
    float scores[kFragments * 4] = {}, out[width / 2] = {};
    uint32_t weights[kHopperColumns / 16][4];
    if (work_.tiles > 0) {
      ptx::wait(&tiles_.queries_full, 0);
      multiply_keys(scores, 0);
      ptx::wait_products<0>();
      ptx::pin(scores);
      leave(tiles_.keys_empty, 0);
      float factors[2];
      weigh(scores, factors, 0);
      pack_weights(weights, scores);
      if (group_ == 1 && work_.tiles > 1) ptx::arrive_threads(other_turn, kBoth);
    }
    for (int tile = 1; tile < work_.tiles; ++tile) {
      // Products of the other warpgroup go between, exponentials beside them.
      ptx::sync_threads(own_turn, kBoth);
      multiply_keys(scores, tile);
      multiply_values(out, weights, tile - 1);
      if (group_ == 0 || tile + 1 < work_.tiles) ptx::arrive_threads(other_turn, kBoth);
      ptx::wait_products<1>();
      ptx::pin(scores);
      leave(tiles_.keys_empty, tile);
      float factors[2];
      weigh(scores, factors, tile);
      ptx::wait_products<0>();
      ptx::pin(out);
      leave(tiles_.values_empty, tile - 1);
      if (__any_sync(kWholeWarp, factors[0] != 1 || factors[1] != 1)) {
#pragma unroll
        for (int i = 0; i < width / 2; ++i) out[i] *= factors[i / 2 % 2];
      }
      pack_weights(weights, scores);
    }
    if (work_.tiles > 0) {
      multiply_values(out, weights, work_.tiles - 1);
      ptx::wait_products<0>();
      ptx::pin(out);
    }
    store(out);
  }

 private:
  // scores = Q K^T of a tile, in flight
  __device__ __forceinline__ void multiply_keys(float (&scores)[kFragments * 4], int tile) {
    const Stage<kStages> stage(tile);
    ptx::wait(&tiles_.keys_full[stage.index], stage.parity);
    const uint64_t keys = key_operand_ + (stage.index * sizeof(tiles_.keys[0]) >> 4);
    ptx::pin(scores);
    ptx::fence_products();
#pragma unroll
    for (int column = 0; column < width; column += 16) {
      constexpr int kStep = sizeof(uint16_t);
      const int panel = column / kPanel, bytes = column % kPanel * kStep;
      ptx::multiply<kIsBf16>(scores,
                             query_operand_ + ((panel * sizeof(tiles_.queries[0]) + bytes) >> 4),
                             keys + ((panel * sizeof(tiles_.keys[0][0]) + bytes) >> 4), column > 0);
    }
    ptx::commit_products();
  }

  // out += P V of a tile, in flight
  __device__ __forceinline__ void multiply_values(float (&out)[width / 2],
                                                  uint32_t (&weights)[kHopperColumns / 16][4],
                                                  int tile) {
    const Stage<kStages> stage(tile);
    ptx::wait(&tiles_.values_full[stage.index], stage.parity);
    const uint64_t values = value_operand_ + (stage.index * sizeof(tiles_.values[0]) >> 4);
    ptx::pin(out);
    ptx::fence_products();
#pragma unroll
    for (int key = 0; key < kHopperColumns; key += 16) {
      ptx::multiply<kIsBf16>(out, weights[key / 16],
                             values + (key * sizeof(tiles_.values[0][0][0]) >> 4));
    }
    ptx::commit_products();
  }

  // Ends this warp's use of a tile.
  __device__ __forceinline__ void leave(uint64_t (&empty)[kStages], int tile) {
    if (threadIdx.x % kWarp == 0) ptx::arrive(&empty[tile % kStages]);
  }

  // Turns products into weights relative to the largest so far; out takes `factors` per row.
  __device__ __forceinline__ void weigh(float (&scores)[kFragments * 4], float (&factors)[2],
                                        int tile) {
    const int start = work_.start(tile);
    if (start + kHopperColumns > least_bound_) {
      each(scores, start, [&](int r, int j, float& score) {
        if (j >= bound_[r]) score = -INFINITY;
      });
    }
    if (separate_ && !parted_ && start < call_.entropy_from) {
      // From here on keys are counted that are no members.
      parted_ = true;
      members_[0] = all_[0], members_[1] = all_[1];
      float largest[2] = {members_[0].largest, members_[1].largest};
      each(scores, start, [&](int r, int j, float& score) {
        if (j >= call_.entropy_from) largest[r] = fmaxf(largest[r], score);
      });
      for (int r = 0; r < 2; ++r) members_[r].raise(row_largest(largest[r]), unit_);
      each(scores, start, [&](int r, int j, float& score) {
        if (j >= call_.entropy_from) members_[r].add(score, unit_);
      });
    }
    float largest[2] = {all_[0].largest, all_[1].largest};
    each(scores, start, [&](int r, int, float& score) { largest[r] = fmaxf(largest[r], score); });
#pragma unroll
    for (int r = 0; r < 2; ++r) factors[r] = all_[r].raise(row_largest(largest[r]), unit_);
    each(scores, start, [&](int r, int, float& score) { score = all_[r].add(score, unit_); });
  }

  // visit(row of this lane, key, score)
  template <typename Visit>
  __device__ __forceinline__ void each(float (&scores)[kFragments * 4], int start, Visit&& visit) {
#pragma unroll
    for (int i = 0; i < kFragments * 4; ++i) {
      visit(i / 2 % 2, start + i / 4 * 8 + 2 * t_ + i % 2, scores[i]);
    }
  }

  static __device__ __forceinline__ float row_largest(float value) {
    return row_reduce(value, [](float a, float b) { return fmaxf(a, b); });
  }

  // Accumulators of two fragments are what a fragment of 16 bits holds.
  static __device__ __forceinline__ void pack_weights(uint32_t (&weights)[kHopperColumns / 16][4],
                                                      const float (&scores)[kFragments * 4]) {
#pragma unroll
    for (int i = 0; i < kFragments * 2; ++i) {
      weights[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
    }
  }

  __device__ __forceinline__ void store(const float (&out)[width / 2]) {
    const bool several = call_.splits > 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Statistics all = all_[r].joined(call_.scale);
      const Statistics members = parted_ ? members_[r].joined(call_.scale) : all;
      if (!there_[r]) continue;
      const int64_t index =
          (work_.b * call_.query_heads + head_[r]) * call_.query_length + query_[r];
      if (t_ == 0) {
        const int last = min(bound_[r], work_.begin + call_.split_keys);
        const int support = max(0, last - max(work_.begin, call_.entropy_from));
        store_split(call_, work_.split, index, all, members, static_cast<float>(support));
      }
      const int64_t rows = call_.batch * call_.query_heads * call_.query_length;
      const int64_t at = ((several ? work_.split * rows : 0) + index) * call_.value_width;
      const float factor = several || all.total == 0 ? 1.0f : 1.0f / all.total;
#pragma unroll
      for (int n = 0; n < width / 8; ++n) {
        const int column = n * 8 + 2 * t_;
        const float pair[2] = {out[4 * n + 2 * r] * factor, out[4 * n + 2 * r + 1] * factor};
        if (!several && call_.value_width % 2 == 0) {
          if (column < call_.value_width) {
            static_cast<uint32_t*>(call_.out)[(at + column) / 2] = pack<T>(pair[0], pair[1]);
          }
          continue;
        }
        for (int c = 0; c < 2; ++c) {
          if (column + c >= call_.value_width) continue;
          if (several) {
            call_.partial_out[at + column + c] = pair[c];
          } else {
            static_cast<T*>(call_.out)[at + column + c] = narrow<T>(pair[c]);
          }
        }
      }
    }
  }

  const AttentionForward& call_;
  Tiles<width>& tiles_;
  const Work& work_;
  const float unit_;
  uint64_t query_operand_, key_operand_, value_operand_;
  int group_, t_, least_bound_;
  int query_[2], head_[2], bound_[2];
  bool there_[2], separate_, parted_ = false;
  Sums all_[2], members_[2];  // over all keys, and over E once the two have parted
};

template <typename T, int width>
__global__ void __launch_bounds__(kHopperThreads, 1)
    forward_hopper_kernel(const __grid_constant__ HopperCall call) {
  if constexpr (ptx::kHopper) {
    auto& tiles = Tiles<width>::of_block();
    Work work(call.forward);
    const Sample sample(call.forward, work.b);
    work.limit(call.forward, sample);
    if (threadIdx.x == 0) tiles.initialize();
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
      ptx::shrink_registers<kProducerRegisters>();
      if (threadIdx.x < kWarp && work.tiles > 0) produce(call, tiles, work, sample.length);
    } else {
      ptx::grow_registers<kConsumerRegisters>();
      Consumer<T, width>(call.forward, tiles, work, sample).run();
    }
  } else {
    __trap();  // the plan chooses this kernel for capability 9.0 alone
  }
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking the driver.
EncodeTiled encode_tiled() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    constexpr unsigned kSinceVersion = 12000;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, kSinceVersion, cudaEnableDefault, &status);
    const bool there = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<EncodeTiled>(found) : nullptr;
  }();
  return function;
}

// Describes [B, heads * group, L, columns] for boxes of `rows` rows of all heads of a group.
cudaError_t describe(CUtensorMap& map, const AttentionForward& call, const Operand& x, int columns,
                     int64_t group, int64_t length, int64_t rows) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  // A dimension of size 1 may have any stride, also one that the engine refuses.
  const auto bytes = [](int64_t count, int64_t stride) {
    return static_cast<cuuint64_t>(count == 1 ? 16 : stride * 2);
  };
  const cuuint64_t sizes[5] = {size(columns), size(group), size(length), size(call.key_heads),
                               size(call.batch)};
  const cuuint64_t strides[4] = {bytes(group, x.head), bytes(length, x.row),
                                 bytes(call.key_heads, group * x.head), bytes(call.batch, x.batch)};
  const cuuint32_t box[5] = {kPanel, static_cast<cuuint32_t>(group), static_cast<cuuint32_t>(rows),
                             1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&map,
             call.type == Scalar::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             5, const_cast<void*>(x.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename T, int width>
cudaError_t launch_hopper(const HopperCall& call, cudaStream_t stream) {
  const int64_t blocks = hopper_blocks(call.forward) * call.forward.splits;
  return launch(forward_hopper_kernel<T, width>, {blocks, kHopperThreads, Tiles<width>::kBytes},
                stream, call);
}

}  // namespace

cudaError_t launch_attention_forward_hopper(const AttentionForward& forward, cudaStream_t stream) {
  HopperCall call{forward, {}, {}, {}};
  const int64_t group = hopper_group(forward);
  for (const cudaError_t error : {describe(call.query, forward, forward.query, forward.width, group,
                                           forward.query_length, hopper_queries(forward)),
                                  describe(call.key, forward, forward.key, forward.width, 1,
                                           forward.key_length, kHopperColumns),
                                  describe(call.value, forward, forward.value, forward.value_width,
                                           1, forward.key_length, kHopperColumns)}) {
    if (error != cudaSuccess) return error;
  }
  const bool narrow = max(forward.width, forward.value_width) <= 64;
  if (forward.type == Scalar::bf16) {
    return narrow ? launch_hopper<Bf16, 64>(call, stream) : launch_hopper<Bf16, 128>(call, stream);
  }
  return narrow ? launch_hopper<Fp16, 64>(call, stream) : launch_hopper<Fp16, 128>(call, stream);
}

}  // namespace driftar::cuda
