// Attention with row entropies on Hopper (sm_90a): one warp has tiles copied in bulk, two
// warpgroups multiply by wgmma and take turns, so that one's exponentials run beside the other's
// products.

#include "attention_hopper_tile.cuh"
#include "attention_store.cuh"

namespace driftar::cuda {

namespace {

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
      if (group_ == 1 && work_.tiles > 1) ptx::arrive_threads(other_turn, kBoth);  // not first
      ptx::wait(&tiles_.queries_full, 0);
      multiply_keys(scores, 0);
      ptx::wait_products<0>();
      ptx::pin(scores);
      leave(tiles_.keys_empty, 0);
      float factors[2];
      weigh(scores, factors, 0);
      pack_weights(weights, scores);
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
