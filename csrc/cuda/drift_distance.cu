// The drifting field: centred points, and distances by one product per tile (docs/ops/drift.md).

#include "drift_pairs.cuh"
#include "product.cuh"
#include "reduce.cuh"

namespace driftar::cuda {

namespace {

constexpr int kCentreWarps = 8, kCentrePoints = 256;
// Any centre serves; that of so many evenly spaced points is close enough to all of them.
constexpr int64_t kCentreSamples = 512;

template <typename T>
__device__ __forceinline__ float load_point(const CentreCall& call, int64_t b, int64_t point,
                                            int64_t feature) {
  return widen(*Place::of(call.parts, point).at<T>(b, feature));
}

// A block centres kCentrePoints points in kWarp features, a lane each. Shared memory: a sum per
// thread.
template <typename T>
__global__ void __launch_bounds__(kCentreWarps* kWarp) centre_kernel(const CentreCall call) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t stride = padded(call.features), columns = stride / kWarp;
  const int64_t point_blocks = blocks_of(call.points, kCentrePoints);
  const int64_t feature = blockIdx.x % columns * kWarp + lane;
  const int64_t first = blockIdx.x / columns % point_blocks * kCentrePoints;
  const int64_t b = blockIdx.x / columns / point_blocks;
  const bool inside = feature < call.features;

  const int64_t samples = min(call.points, kCentreSamples);
  float sum = 0;
  for (int64_t i = warp; i < samples && inside; i += kCentreWarps) {
    sum += load_point<T>(call, b, i * call.points / samples, feature);
  }
  auto* sums = static_cast<float*>(shared_memory());
  sums[threadIdx.x] = sum;
  __syncthreads();
  float centre = 0;
  for (int i = 0; i < kCentreWarps; ++i) centre += sums[i * kWarp + lane];
  centre /= static_cast<float>(samples);

  const int64_t end = min(first + kCentrePoints, call.points);
  for (int64_t point = first + warp; point < end; point += kCentreWarps) {
    const float value = inside ? load_point<T>(call, b, point, feature) - centre : 0.0f;
    call.centred[(b * call.points + point) * stride + feature] = value;
  }
}

// From the difference of the points themselves.
__device__ float exact_squared(const float* x, const float* y, int64_t features) {
  float sum = 0;
  for (int64_t s = 0; s < features; ++s) {
    const float difference = x[s] - y[s];
    sum += difference * difference;
  }
  return sum;
}

// A block computes a tile of distances. Shared memory: the product's; then the tile, the squared
// norms of its rows and columns, and a sum per warp.
__global__ void __launch_bounds__(kProductThreads, 2) distance_kernel(const DistanceCall call) {
  const int64_t row_blocks = blocks_of(call.rows, kTileRows);
  const int64_t column_blocks = blocks_of(call.points, kTileColumns);
  const int64_t local = blockIdx.x % row_blocks * kTileRows;
  const int64_t column = blockIdx.x / row_blocks % column_blocks * kTileColumns;
  const int64_t b = blockIdx.x / row_blocks / column_blocks;
  const int64_t stride = padded(call.features), row = call.first_row + local;
  const int64_t last_row = call.first_row + call.rows;
  const float* points = call.centred + b * call.points * stride;
  auto* shared = static_cast<float*>(shared_memory());

  float norm = 0;  // of row threadIdx.x of the chunks: first those of A, then those of B
  const int own = threadIdx.x;
  TileSum product = multiply<true>(
      {points, stride, last_row}, {points, stride, call.points}, row, column, stride, shared,
      [&](const float* a, const float* b) {
        if (own >= kTileRows + kTileColumns) return;
        const float* values =
            own < kTileRows ? a + own * kRowStride : b + (own - kTileRows) * kRowStride;
#pragma unroll
        for (int k = 0; k < kDepth; k += 4) {
          const float4 four = *reinterpret_cast<const float4*>(values + k);
          norm += four.x * four.x + four.y * four.y + four.z * four.z + four.w * four.w;
        }
      });
  float *row_norms = shared + kTileShared, *column_norms = row_norms + kTileRows;
  if (own < kTileRows + kTileColumns) row_norms[own] = norm;

  float weighted = 0;
  product.each(shared, [&](int r, int c, float value) {
    const int64_t i = row + r, j = column + c;
    if (i >= last_row || j >= call.points) return;
    const float both = row_norms[r] + column_norms[c];
    float squared = both - 2.0f * value;
    // Comparisons are written so that NaN stays.
    if (squared < both * kCloseShare) {
      squared =
          i == j ? 0.0f : exact_squared(points + i * stride, points + j * stride, call.features);
    }
    const float distance = at_least(kMinDistance, sqrtf(squared));
    if (call.distances != nullptr) {
      call.distances[(b * call.rows + local + r) * call.points + j] = distance;
    }
    if (call.partial != nullptr) weighted += distance * call.weight[b * call.points + j];
  });
  if (call.partial == nullptr) return;
  float* of_warps = column_norms + kTileColumns;
  weighted = block_reduce<kProductThreads>(weighted, of_warps, sum_of);
  if (threadIdx.x == 0) call.partial[blockIdx.x] = weighted;
}

}  // namespace

int64_t distance_blocks(const PairsCall& call) {
  return call.batch * blocks_of(call.rows, kTileRows) * blocks_of(call.points, kTileColumns);
}

cudaError_t launch_centre(const CentreCall& call, cudaStream_t stream) {
  const int64_t blocks =
      call.batch * blocks_of(call.points, kCentrePoints) * (padded(call.features) / kWarp);
  constexpr int kThreads = kCentreWarps * kWarp;
  return dispatch(call.type, [&](auto tag) {
    return launch(centre_kernel<typename decltype(tag)::type>,
                  {blocks, kThreads, kThreads * sizeof(float)}, stream, call);
  });
}

cudaError_t launch_distances(const DistanceCall& call, cudaStream_t stream) {
  return launch(distance_kernel, {distance_blocks(call), kProductThreads, kProductShared}, stream,
                call);
}

}  // namespace driftar::cuda
