// Many small drifting problems: a block holds the pairs of one in shared memory and streams its
// points, as they lie in memory, past them (docs/ops/drift.md).

#include "drift_pairs.cuh"
#include "product.cuh"
#include "reduce.cuh"

namespace driftar::cuda {

namespace {

constexpr int kThreads = kBatchThreads;
static_assert(kBatchDepth == kWarp && kBatchTile == 32);

// A block's shared memory: `sets` matrices of pairs, then what BatchShape counts.
struct BatchMemory : BatchShape {
  float* pairs;  // [sets, rows, stride]
  void* raw;     // [M, kBatchDepth] of the points' dtype
  float* chunk;  // [points, kBatchRowStride | kBatchColumnStride], centred
  float *row_least, *row_half, *column_least, *column_half;
  float* of_threads;
  float* of_warps;  // [kBatchWarps, kMaxTemperatures]

  __device__ BatchMemory(const BatchCall& call, int sets)
      : BatchShape(call.generated, call.points) {
    pairs = static_cast<float*>(shared_memory());
    float* own_points = pairs + static_cast<int64_t>(sets) * rows * stride;
    raw = own_points;
    chunk = own_points + points * kBatchDepth;
    row_least = chunk + points * kBatchColumnStride;
    row_half = row_least + rows;
    column_least = row_half + rows;
    column_half = column_least + points;
    of_threads = column_half + points;
    of_warps = of_threads + kThreads;
  }
};

// Asks for kBatchDepth features of all points from `feature` on; zeros behind the last one.
template <typename T>
__device__ void load_chunk(const BatchCall& call, int64_t b, int64_t feature, T* raw) {
  constexpr int kCount = 16 / sizeof(T), kPerRow = kBatchDepth / kCount;
  for (int at = threadIdx.x; at < call.points * kPerRow && feature < call.features;
       at += kThreads) {
    const Place place = Place::of(call.parts, at / kPerRow);
    const int64_t first = feature + at % kPerRow * kCount;
    const int count =
        static_cast<int>(max(int64_t{0}, min(int64_t{kCount}, call.features - first)));
    const T* source = place.at<T>(b, count > 0 ? first : 0);
    T* target = raw + static_cast<int64_t>(at) * kCount;
    if (place.part.vectors) {
      ptx::copy_async(target, source, count * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        target[i] = i < count ? source[i * place.part.column] : narrow<T>(0.0f);
      }
    }
  }
  ptx::commit_copies();
}

// Calls visit(feature) with the points centred in memory.chunk, kBatchDepth features from there on,
// while the next ones are in flight. Rows and columns of padding are zeros.
template <typename T, int stride, typename Visit>
__device__ __forceinline__ void each_chunk(const BatchCall& call, int64_t b,
                                           const BatchMemory& memory, Visit&& visit) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T* raw = static_cast<T*>(memory.raw);
  load_chunk(call, b, 0, raw);
  for (int64_t feature = 0; feature < call.features; feature += kBatchDepth) {
    ptx::wait_copies<0>();
    __syncthreads();  // the points are there, and nobody reads the last chunk any more
    float sum = 0;
    for (int p = warp; p < call.points; p += kBatchWarps) sum += widen(raw[p * kBatchDepth + lane]);
    memory.of_threads[threadIdx.x] = sum;
    __syncthreads();
    float centre = 0;
    for (int i = 0; i < kBatchWarps; ++i) centre += memory.of_threads[i * kWarp + lane];
    centre /= static_cast<float>(call.points);
    for (int p = warp; p < memory.points; p += kBatchWarps) {
      memory.chunk[p * stride + lane] =
          p < call.points ? widen(raw[p * kBatchDepth + lane]) - centre : 0.0f;
    }
    __syncthreads();  // the chunk is there, and the points as they lay are not needed any more
    load_chunk(call, b, feature + kBatchDepth, raw);
    visit(feature);
  }
  ptx::wait_copies<0>();
  __syncthreads();
}

// From the difference of the points themselves, by a warp.
template <typename T>
__device__ float exact_squared(const BatchCall& call, int64_t b, int64_t i, int64_t j) {
  const Place x = Place::of(call.parts, i), y = Place::of(call.parts, j);
  float sum = 0;
  for (int64_t s = threadIdx.x % kWarp; s < call.features; s += kWarp) {
    const float difference = widen(*x.at<T>(b, s)) - widen(*y.at<T>(b, s));
    sum += difference * difference;
  }
  return warp_sum(sum);
}

// Squared distances of all pairs to memory.pairs, by products of centred points; -1 where they
// lose too much to cancellation.
template <typename T>
__device__ void squared_distances(const BatchCall& call, int64_t b, const BatchMemory& memory) {
  constexpr int kHeld = 2;  // tiles that a warp holds in registers during a pass over the points
  const int warp = threadIdx.x / kWarp;
  const int columns = memory.points / kBatchTile;
  const int tiles = memory.rows / kBatchTile * columns;
  float* norms = memory.column_half;
  for (int first = warp; first - warp < tiles; first += kHeld * kBatchWarps) {
    for (int p = threadIdx.x; p < memory.points; p += kThreads) norms[p] = 0;
    WarpSum<2, 4> sums[kHeld];
    const auto each_tile = [&](auto&& visit) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int tile = first + i * kBatchWarps;
        if (tile >= tiles) continue;
        visit(sums[i], tile / columns * kBatchTile, tile % columns * kBatchTile);
      }
    };
    each_chunk<T, kBatchRowStride>(call, b, memory, [&](int64_t) {
      for (int p = threadIdx.x; p < memory.points; p += kThreads) {
        const float* values = memory.chunk + p * kBatchRowStride;
        float norm = 0;
#pragma unroll
        for (int k = 0; k < kBatchDepth; ++k) norm += values[k] * values[k];
        norms[p] += norm;
      }
      each_tile([&](WarpSum<2, 4>& sum, int row, int column) {
        sum.template add_product<true, 1>(memory.chunk + row * kBatchRowStride, kBatchRowStride,
                                          memory.chunk + column * kBatchRowStride, kBatchRowStride,
                                          kBatchDepth);
      });
    });
    each_tile([&](const WarpSum<2, 4>& sum, int row, int column) {
      sum.each([&](int r, int c, float value) {
        const float both = norms[row + r] + norms[column + c];
        const float squared = both - 2.0f * value;
        // Comparisons are written so that NaN stays.
        memory.pairs[(row + r) * memory.stride + column + c] =
            squared < both * kCloseShare ? -1.0f : squared;
      });
    });
    __syncthreads();  // nobody reads the norms any more, and the pairs are there
  }
}

// visit(i, j, inside) for all pairs, a warp a row; lanes are together.
template <typename Visit>
__device__ __forceinline__ void each_pair(const BatchCall& call, Visit&& visit) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int i = warp; i < call.generated; i += kBatchWarps) {
    for (int j = lane; j - lane < call.points; j += kWarp) visit(i, j, j < call.points);
  }
}

// Distances to memory.pairs; visit(i, j, distance).
template <typename T, typename Visit>
__device__ void compute_distances(const BatchCall& call, int64_t b, const BatchMemory& memory,
                                  Visit&& visit) {
  squared_distances<T>(call, b, memory);
  each_pair(call, [&](int i, int j, bool inside) {
    float& own = memory.pairs[i * memory.stride + j];
    float squared = inside ? own : 0.0f;
    const unsigned close = __ballot_sync(kWholeWarp, inside && squared < 0);
    for (int lane = 0; close != 0 && lane < kWarp; ++lane) {
      if (!(close >> lane & 1u)) continue;
      const int other = j - static_cast<int>(threadIdx.x % kWarp) + lane;
      const float exact = i == other ? 0.0f : exact_squared<T>(call, b, i, other);
      if (j == other) squared = exact;
    }
    if (!inside) return;
    own = at_least(kMinDistance, sqrtf(squared));
    visit(i, j, own);
  });
}

// Scaled distances to memory.pairs, from the kept ones if there are.
template <typename T>
__device__ void scaled_distances(const BatchCall& call, int64_t b, const BatchMemory& memory) {
  const float unit = distance_unit(call);
  const auto scaled = [&](int i, int j, float distance) {
    memory.pairs[i * memory.stride + j] = distance / unit + (i == j ? kSelfDistance : 0.0f);
  };
  if (call.kept == nullptr) {
    compute_distances<T>(call, b, memory, scaled);
  } else {
    const float* kept = call.kept + b * call.generated * call.points;
    each_pair(call, [&](int i, int j, bool inside) {
      if (inside) scaled(i, j, kept[i * call.points + j]);
    });
  }
  __syncthreads();
}

// Least scaled distances, which serve every temperature: the largest logit is minus that over R.
__device__ void find_least(const BatchCall& call, const BatchMemory& memory) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int i = warp; i < call.generated; i += kBatchWarps) {
    float least = INFINITY;
    for (int j = lane; j < call.points; j += kWarp) {
      least = least_of(memory.pairs[i * memory.stride + j], least);
    }
    least = warp_reduce(least, least_of);
    if (lane == 0) memory.row_least[i] = least;
  }
  for (int j = threadIdx.x; j < call.points; j += kThreads) {
    float least = INFINITY;
    for (int i = 0; i < call.generated; ++i) {
      least = least_of(memory.pairs[i * memory.stride + j], least);
    }
    memory.column_least[j] = least;
  }
  __syncthreads();
}

// Halves of the log-sum-exps of one temperature, to memory and to the balance.
__device__ void normalise(const BatchCall& call, const BatchMemory& memory, float rate,
                          const Balance& balance) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto half_of = [&](float sum, float least) { return 0.5f * (logf(sum) - least * rate); };
  for (int i = warp; i < call.generated; i += kBatchWarps) {
    const float least = memory.row_least[i];
    float sum = 0;
    for (int j = lane; j < call.points; j += kWarp) {
      sum += expf((least - memory.pairs[i * memory.stride + j]) * rate);
    }
    sum = warp_sum(sum);
    if (lane == 0) balance.row_half[i] = memory.row_half[i] = half_of(sum, least);
  }
  for (int j = threadIdx.x; j < call.points; j += kThreads) {
    const float least = memory.column_least[j];
    float sum = 0;
    for (int i = 0; i < call.generated; ++i) {
      sum += expf((least - memory.pairs[i * memory.stride + j]) * rate);
    }
    balance.column_half[j] = memory.column_half[j] = half_of(sum, least);
  }
  __syncthreads();
}

// The coefficients of one temperature, zeros in the padding, and A- and A+ to the balance.
__device__ void fill_coefficients(const BatchCall& call, int64_t b, const BatchMemory& memory,
                                  float rate, const Balance& balance, float* coefficients) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t repelling = call.points - call.positives;
  const float* weight = call.weight + b * call.points;
  const float unit = force_unit(call);
  for (int i = warp; i < memory.rows; i += kBatchWarps) {
    const bool there = i < call.generated;
    float* row = coefficients + i * memory.stride;
    float repulsion = 0, attraction = 0;
    for (int j = lane; j < memory.points; j += kWarp) {
      row[j] = 0;
      if (!there || j >= call.points) continue;
      row[j] = affinity(memory.pairs[i * memory.stride + j], rate, memory.row_half[i],
                        memory.column_half[j], weight[j]);
      (j < repelling ? repulsion : attraction) += row[j];
    }
    if (!there) continue;
    repulsion = warp_sum(repulsion), attraction = warp_sum(attraction);
    if (lane == 0) balance.repulsion[i] = repulsion, balance.attraction[i] = attraction;
    const float to_attract = repulsion / unit, to_repel = -attraction / unit;
    for (int j = lane; j < call.points; j += kWarp) row[j] *= j < repelling ? to_repel : to_attract;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) batch_distance_kernel(const BatchCall call) {
  const int64_t b = blockIdx.x;
  const BatchMemory memory(call, 1);
  float weighted = 0;
  compute_distances<T>(call, b, memory, [&](int i, int j, float distance) {
    if (call.distances != nullptr) {
      call.distances[(b * call.generated + i) * call.points + j] = distance;
    }
    weighted += distance * call.weight[b * call.points + j];
  });
  weighted = block_reduce<kThreads>(weighted, memory.of_threads, sum_of);
  if (threadIdx.x == 0) call.partial[b] = weighted;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) batch_squares_kernel(const BatchCall call) {
  const int64_t b = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const BatchMemory memory(call, 1 + call.together);
  const int set = memory.rows * memory.stride, row_tiles = memory.rows / kBatchTile;
  scaled_distances<T>(call, b, memory);
  find_least(call, memory);
  for (int first = 0; first < call.temperature_count; first += call.together) {
    const int count = min(call.together, call.temperature_count - first);
    for (int t = 0; t < count; ++t) {
      const float rate = call.inverse_temperatures[first + t];
      const Balance balance = balance_of(call, call.balances, b, first + t);
      normalise(call, memory, rate, balance);
      fill_coefficients(call, b, memory, rate, balance, memory.pairs + (1 + t) * set);
      __syncthreads();  // nobody reads the halves any more
    }
    float* of_warp = memory.of_warps + warp * kMaxTemperatures;
    for (int t = lane; t < count; t += kWarp) of_warp[t] = 0;
    each_chunk<T, kBatchColumnStride>(call, b, memory, [&](int64_t) {
      for (int tile = warp; tile < count * row_tiles; tile += kBatchWarps) {
        WarpSum<2, 4> sum;
        sum.template add_product<false, 4>(memory.pairs + set + tile * kBatchTile * memory.stride,
                                           memory.stride, memory.chunk, kBatchColumnStride,
                                           memory.points);
        float squares = 0;
        sum.each([&](int, int, float value) { squares += value * value; });
        squares = warp_sum(squares);
        if (lane == 0) of_warp[tile / row_tiles] += squares;
      }
    });
    for (int t = threadIdx.x; t < count; t += kThreads) {
      float squares = 0;
      for (int i = 0; i < kBatchWarps; ++i) squares += memory.of_warps[i * kMaxTemperatures + t];
      call.partial[b * call.temperature_count + first + t] = squares;
    }
    __syncthreads();  // nobody reads the sums any more
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) batch_force_kernel(const BatchCall call) {
  const int64_t b = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const BatchMemory memory(call, 1);
  const int64_t repelling = call.points - call.positives;
  const float* weight = call.weight + b * call.points;
  scaled_distances<T>(call, b, memory);
  const float unit = force_unit(call);
  for (int i = warp; i < memory.rows; i += kBatchWarps) {
    for (int j = lane; j < memory.points; j += kWarp) {
      float& own = memory.pairs[i * memory.stride + j];  // the distance, then the coefficient
      float sum = 0;
      for (int t = 0; t < call.temperature_count && i < call.generated && j < call.points; ++t) {
        const Balance balance = balance_of(call, call.balances, b, t);
        const float value = affinity(own, call.inverse_temperatures[t], balance.row_half[i],
                                     balance.column_half[j], weight[j]);
        const float other = j < repelling ? -balance.attraction[i] : balance.repulsion[i];
        sum += value * (call.factors[t] / unit * other);
      }
      own = sum;
    }
  }
  float* force = call.force + b * call.generated * call.features;
  const int tiles = memory.rows / 16 * 2;  // of 16 x 16
  each_chunk<T, kBatchColumnStride>(call, b, memory, [&](int64_t feature) {
    for (int tile = warp; tile < tiles; tile += kBatchWarps) {
      const int row = tile / 2 * 16, column = tile % 2 * 16;
      WarpSum<1, 2> sum;
      sum.template add_product<false, 4>(memory.pairs + row * memory.stride, memory.stride,
                                         memory.chunk + column, kBatchColumnStride, memory.points);
      sum.each([&](int r, int c, float value) {
        const int64_t i = row + r, s = feature + column + c;
        if (i < call.generated && s < call.features) force[i * call.features + s] = value;
      });
    }
  });
}

cudaError_t launch_batch(void (*kernel)(BatchCall), const BatchCall& call, int sets,
                         cudaStream_t stream) {
  const size_t shared = BatchShape(call.generated, call.points).shared_bytes(sets);
  return launch(kernel, {call.batch, kThreads, shared}, stream, call);
}

}  // namespace

cudaError_t launch_batch_distances(const BatchCall& call, cudaStream_t stream) {
  return dispatch(call.type, [&](auto tag) {
    return launch_batch(batch_distance_kernel<typename decltype(tag)::type>, call, 1, stream);
  });
}

cudaError_t launch_batch_squares(const BatchCall& call, cudaStream_t stream) {
  return dispatch(call.type, [&](auto tag) {
    return launch_batch(batch_squares_kernel<typename decltype(tag)::type>, call, 1 + call.together,
                        stream);
  });
}

cudaError_t launch_batch_force(const BatchCall& call, cudaStream_t stream) {
  return dispatch(call.type, [&](auto tag) {
    return launch_batch(batch_force_kernel<typename decltype(tag)::type>, call, 1, stream);
  });
}

}  // namespace driftar::cuda
