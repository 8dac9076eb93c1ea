// The drifting field: log-sum-exp of rows and columns, coefficients, forces (docs/ops/drift.md).

#include "drift_pairs.cuh"
#include "product.cuh"
#include "reduce.cuh"

namespace driftar::cuda {

namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
// Temperatures that one pass over the distances serves.
constexpr int kTogether = 4;

// D_ij = d_ij / scale, 100 more between a sample and itself. Since the largest logit at temperature
// R is minus the least D over R, one minimum serves all temperatures.
struct Scaled {
  const float* distances;  // [rows, M] of the problem
  int64_t points, first_row;
  float scale;

  __device__ Scaled(const PairsCall& call, const float* of_batch, int64_t b)
      : distances(of_batch + b * call.rows * call.points),
        points(call.points),
        first_row(call.first_row),
        scale(distance_unit(call)) {}

  __device__ float operator()(int64_t local, int64_t column) const {
    const float self = first_row + local == column ? kSelfDistance : 0.0f;
    return distances[local * points + column] / scale + self;
  }
};

// visit(t, inverse temperature) for up to kTogether temperatures from `first` on.
template <typename Visit>
__device__ __forceinline__ void each_temperature(const PairsCall& call, int first, Visit&& visit) {
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
    if (first + i < call.temperature_count) visit(i, call.inverse_temperatures[first + i]);
  }
}

// A warp takes a row.
__global__ void __launch_bounds__(kThreads) row_kernel(const NormaliserCall call) {
  const int lane = threadIdx.x % kWarp;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (task >= call.batch * call.rows) return;
  const int64_t b = task / call.rows, local = task % call.rows;
  const Scaled scaled(call, call.distances, b);
  float least = INFINITY;
  for (int64_t j = lane; j < call.points; j += kWarp) least = least_of(scaled(local, j), least);
  least = warp_reduce(least, least_of);
  for (int first = 0; first < call.temperature_count; first += kTogether) {
    float sums[kTogether] = {};
    for (int64_t j = lane; j < call.points; j += kWarp) {
      const float above = least - scaled(local, j);
      each_temperature(call, first, [&](int i, float rate) { sums[i] += expf(above * rate); });
    }
    each_temperature(call, first, [&](int i, float rate) {
      const float half = 0.5f * (logf(warp_sum(sums[i])) - least * rate);
      const Balance balance = balance_of(call, call.balances, b, first + i);
      if (lane == 0) balance.row_half[call.first_row + local] = half;
    });
  }
}

// A block takes kWarp columns, a lane each, and its warps take turns with the rows. Shared memory:
// a value per thread.
__global__ void __launch_bounds__(kThreads) column_kernel(const NormaliserCall call) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t blocks = blocks_of(call.points, kWarp);
  const int64_t b = blockIdx.x / blocks, j = blockIdx.x % blocks * kWarp + lane;
  const bool inside = j < call.points;
  const Scaled scaled(call, call.distances, b);
  auto* values = static_cast<float*>(shared_memory());
  // Of the block's rows, in the order of the warps; all threads of a column get it.
  const auto merge = [&](float value, auto join) {
    __syncthreads();
    values[threadIdx.x] = value;
    __syncthreads();
    value = values[lane];
    for (int i = 1; i < kWarps; ++i) value = join(value, values[i * kWarp + lane]);
    return value;
  };
  float least = INFINITY;
  for (int64_t i = warp; i < call.rows && inside; i += kWarps)
    least = least_of(scaled(i, j), least);
  least = merge(least, least_of);

  const bool writes = inside && warp == 0;
  const bool is_first = call.first_row == 0;
  const bool is_last = call.first_row + call.rows == call.generated;
  const float before = writes && !is_first ? call.column_least[b * call.points + j] : INFINITY;
  const float both = least_of(before, least);
  for (int first = 0; first < call.temperature_count; first += kTogether) {
    float sums[kTogether] = {};
    for (int64_t i = warp; i < call.rows && inside; i += kWarps) {
      const float above = least - scaled(i, j);
      each_temperature(call, first, [&](int t, float rate) { sums[t] += expf(above * rate); });
    }
    each_temperature(call, first, [&](int t, float rate) {
      float sum = merge(sums[t], sum_of);
      if (!writes) return;
      float& total = balance_of(call, call.balances, b, first + t).column_half[j];
      sum *= expf((both - least) * rate);
      if (!is_first) sum += total * expf((both - before) * rate);
      total = is_last ? 0.5f * (logf(sum) - both * rate) : sum;
    });
  }
  if (writes) call.column_least[b * call.points + j] = both;
}

// A warp takes a row: affinities a_ij, their sums A- and A+ over the points that repel and attract,
// and the row of coefficients sum_t f_t (A-_t a_ij [j attracts] - A+_t a_ij [j repels]) / unit.
__global__ void __launch_bounds__(kThreads) coefficient_kernel(const ForceCall call) {
  const int lane = threadIdx.x % kWarp;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (task >= call.batch * call.rows) return;
  const int64_t b = task / call.rows, local = task % call.rows;
  const int64_t repelling = call.points - call.positives, stride = padded(call.points);
  const Scaled scaled(call, call.distances, b);
  const float* weight = call.weight + b * call.points;
  float* row = call.coefficients + task * stride;
  const float unit = force_unit(call);

  for (int64_t j = call.points + lane; j < stride; j += kWarp) row[j] = 0.0f;
  const int first = call.factors == nullptr ? call.temperature : 0;
  const int last = call.factors == nullptr ? call.temperature + 1 : call.temperature_count;
  for (int t = first; t < last; ++t) {
    const float rate = call.inverse_temperatures[t];
    const Balance balance = balance_of(call, call.balances, b, t);
    const int64_t i = call.first_row + local;
    const auto affinity_of = [&](int64_t j) {
      return affinity(scaled(local, j), rate, balance.row_half[i], balance.column_half[j],
                      weight[j]);
    };
    float repulsion = 0, attraction = 0;
    if (call.balanced) {
      repulsion = balance.repulsion[i], attraction = balance.attraction[i];
    } else {
      for (int64_t j = lane; j < call.points; j += kWarp) {
        (j < repelling ? repulsion : attraction) += affinity_of(j);
      }
      repulsion = warp_sum(repulsion), attraction = warp_sum(attraction);
      if (lane == 0) balance.repulsion[i] = repulsion, balance.attraction[i] = attraction;
    }
    const float factor = (call.factors == nullptr ? 1.0f : call.factors[t]) / unit;
    repulsion *= factor, attraction *= factor;
    for (int64_t j = lane; j < call.points; j += kWarp) {
      const float coefficient = affinity_of(j) * (j < repelling ? -attraction : repulsion);
      row[j] = t == first ? coefficient : row[j] + coefficient;
    }
  }
}

// A block computes a tile of forces. Shared memory: the product's; then the tile and a sum per
// warp.
__global__ void __launch_bounds__(kProductThreads, 2) force_kernel(const ForceCall call) {
  const int64_t row_blocks = blocks_of(call.rows, kTileRows);
  const int64_t feature_blocks = blocks_of(call.features, kTileColumns);
  const int64_t feature = blockIdx.x % feature_blocks * kTileColumns;
  const int64_t local = blockIdx.x / feature_blocks % row_blocks * kTileRows;
  const int64_t b = blockIdx.x / feature_blocks / row_blocks;
  const int64_t stride = padded(call.points), point_stride = padded(call.features);
  auto* shared = static_cast<float*>(shared_memory());
  TileSum product =
      multiply<false>({call.coefficients + b * call.rows * stride, stride, call.rows},
                      {call.centred + b * call.points * point_stride, point_stride, call.points},
                      local, feature, stride, shared, [](const float*, const float*) {});
  float squares = 0;
  product.each(shared, [&](int r, int c, float value) {
    if (local + r >= call.rows || feature + c >= call.features) return;
    squares += value * value;
    if (call.force == nullptr) return;
    const int64_t row = b * call.generated + call.first_row + local + r;
    call.force[row * call.features + feature + c] = value;
  });
  if (call.partial == nullptr) return;
  squares = block_reduce<kProductThreads>(squares, shared + kTileShared, sum_of);
  if (threadIdx.x == 0) call.partial[blockIdx.x] = squares;
}

}  // namespace

int64_t force_blocks(const PairsCall& call) {
  return call.batch * blocks_of(call.rows, kTileRows) * blocks_of(call.features, kTileColumns);
}

cudaError_t launch_normalisers(const NormaliserCall& call, cudaStream_t stream) {
  const cudaError_t error =
      launch(row_kernel, {blocks_of(call.batch * call.rows, kWarps), kThreads}, stream, call);
  if (error != cudaSuccess) return error;
  return launch(column_kernel,
                {call.batch * blocks_of(call.points, kWarp), kThreads, kThreads * sizeof(float)},
                stream, call);
}

cudaError_t launch_force(const ForceCall& call, cudaStream_t stream) {
  const cudaError_t error = launch(
      coefficient_kernel, {blocks_of(call.batch * call.rows, kWarps), kThreads}, stream, call);
  if (error != cudaSuccess) return error;
  return launch(force_kernel, {force_blocks(call), kProductThreads, kProductShared}, stream, call);
}

}  // namespace driftar::cuda
