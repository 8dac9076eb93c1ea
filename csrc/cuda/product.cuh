#pragma once

// A tile of a matrix product of fp32 matrices on the tensor cores, to fp32 accuracy: with
// x = high + low, both of tf32, a b = a_low b_high + a_high b_low + a_high b_high, to 2^-21.
//
// Operands of a tile stream through shared memory in chunks of kDepth, kStages of them in flight.

#include "launch.cuh"
#include "ptx.cuh"

#include <cstdint>

namespace driftar::cuda {

constexpr int kTileRows = 64, kTileColumns = 128, kDepth = 32, kStages = 3;
constexpr int kProductThreads = 256;
// Strides in shared memory for which the lanes of a fragment fall into different banks.
constexpr int kRowStride = kDepth + 4, kWideStride = kTileColumns + 8;
constexpr int kStageFloats = (kTileRows + kTileColumns) * kRowStride;
static_assert(kTileColumns * kRowStride >= kDepth * kWideStride);
constexpr size_t kProductShared = sizeof(float) * kStages * kStageFloats;

// Rows of `stride` values, a multiple of 4 and aligned to 16 bytes. Rows from `rows` on count as 0.
struct Matrix {
  const float* data;
  int64_t stride, rows;
};

template <int count>
__device__ __forceinline__ void split(const float (&x)[count], uint32_t (&high)[count],
                                      uint32_t (&low)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    high[i] = ptx::round_tf32(x[i]);
    low[i] = ptx::round_tf32(x[i] - __uint_as_float(high[i]));
  }
}

// What a warp accumulates: 16 m x 8 n values.
template <int m, int n>
struct WarpSum {
  float values[m][n][4] = {};

  // Adds A B, or A B^T if `transposed`: rows of A from `a` on and, if transposed, rows of B from
  // `b` on, else its columns; `depth`, a multiple of 8, is unrolled in steps of 8.
  template <bool transposed, int unrolled>
  __device__ __forceinline__ void add_product(const float* a, int a_stride, const float* b,
                                              int b_stride, int depth) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const float* own_a = a + g * a_stride + t;
    const float* own_b = transposed ? b + g * b_stride + t : b + t * b_stride + g;
#pragma unroll unrolled
    for (int k = 0; k < depth; k += 8) {
      uint32_t a_high[m][4], a_low[m][4];
#pragma unroll
      for (int row = 0; row < m; ++row) {
        const float* at = own_a + row * 16 * a_stride + k;
        const float operand[4] = {at[0], at[8 * a_stride], at[4], at[8 * a_stride + 4]};
        split(operand, a_high[row], a_low[row]);
      }
#pragma unroll
      for (int column = 0; column < n; ++column) {
        float operand[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          operand[i] = transposed ? own_b[column * 8 * b_stride + k + 4 * i]
                                  : own_b[(k + 4 * i) * b_stride + column * 8];
        }
        uint32_t b_high[2], b_low[2];
        split(operand, b_high, b_low);
#pragma unroll
        for (int row = 0; row < m; ++row) {
          ptx::mma_tf32(values[row][column], a_low[row], b_high);
          ptx::mma_tf32(values[row][column], a_high[row], b_low);
          ptx::mma_tf32(values[row][column], a_high[row], b_high);
        }
      }
    }
  }

  // visit(row, column, value) for what this lane holds.
  template <typename Visit>
  __device__ __forceinline__ void each(Visit&& visit) const {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int row = 0; row < m; ++row) {
#pragma unroll
      for (int column = 0; column < n; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(row * 16 + g + i / 2 * 8, column * 8 + 2 * t + i % 2, values[row][column][i]);
        }
      }
    }
  }
};

// What a block accumulates: a tile, 32 x 32 values a warp.
struct TileSum {
  WarpSum<2, 4> own;

  // visit(row, column, value), relative to the tile, a thread a column at a time: through shared
  // memory, so that rows are visited as they lie. All threads take part.
  template <typename Visit>
  __device__ __forceinline__ void each(float* shared, Visit&& visit) const {
    const int warp = threadIdx.x / kWarp;
    float* target = shared + warp / 4 * 32 * kWideStride + warp % 4 * 32;
    own.each([&](int row, int column, float value) { target[row * kWideStride + column] = value; });
    __syncthreads();
    for (int at = threadIdx.x; at < kTileRows * kTileColumns; at += kProductThreads) {
      const int row = at / kTileColumns, column = at % kTileColumns;
      visit(row, column, shared[row * kWideStride + column]);
    }
  }
};
// Shared memory that each() takes, in values.
constexpr int kTileShared = kTileRows * kWideStride;

// `count` rows of `width` values from (row, column) on to shared memory.
template <int count, int width, int shared_stride>
__device__ __forceinline__ void copy_rows(float* target, const Matrix& from, int64_t row,
                                          int64_t column) {
  constexpr int kPerRow = width / 4;
  static_assert(count * kPerRow % kProductThreads == 0);
#pragma unroll
  for (int i = 0; i < count * kPerRow / kProductThreads; ++i) {
    const int at = i * kProductThreads + threadIdx.x, r = at / kPerRow, c = at % kPerRow * 4;
    const bool inside = row + r < from.rows && column + c < from.stride;
    const float* source = inside ? from.data + (row + r) * from.stride + column + c : from.data;
    ptx::copy_async(target + r * shared_stride + c, source, inside ? 16 : 0);
  }
}

// The tile at (row, column) of A B, or of A B^T if `transposed`, over `depth`, a multiple of
// kDepth. visit(a, b) sees the chunks in shared memory: a [kTileRows, kRowStride] and b
// [kTileColumns, kRowStride] if transposed, else [kDepth, kWideStride].
template <bool transposed, typename Visit>
__device__ __forceinline__ TileSum multiply(const Matrix& a, const Matrix& b, int64_t row,
                                            int64_t column, int64_t depth, float* shared,
                                            Visit&& visit) {
  const int chunks = static_cast<int>(depth / kDepth);
  const auto load = [&](int chunk) {
    if (chunk < chunks) {
      float* stage = shared + chunk % kStages * kStageFloats;
      const int64_t at = static_cast<int64_t>(chunk) * kDepth;
      copy_rows<kTileRows, kDepth, kRowStride>(stage, a, row, at);
      stage += kTileRows * kRowStride;
      if constexpr (transposed) {
        copy_rows<kTileColumns, kDepth, kRowStride>(stage, b, column, at);
      } else {
        copy_rows<kDepth, kTileColumns, kWideStride>(stage, b, at, column);
      }
    }
    ptx::commit_copies();
  };
  constexpr int kUnrolled = transposed ? 2 : 4;  // what fits into registers
  const int warp = threadIdx.x / kWarp, row_of_warp = warp / 4 * 32, column_of_warp = warp % 4 * 32;
  TileSum sum;
  for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    ptx::wait_copies<kStages - 2>();
    __syncthreads();  // the chunk is there, and nobody reads the one that is overwritten next
    load(chunk + kStages - 1);
    const float* own_a = shared + chunk % kStages * kStageFloats;
    const float* own_b = own_a + kTileRows * kRowStride;
    visit(own_a, own_b);
    constexpr int kStride = transposed ? kRowStride : kWideStride;
    sum.own.add_product<transposed, kUnrolled>(own_a + row_of_warp * kRowStride, kRowStride,
                                               own_b + column_of_warp * (transposed ? kStride : 1),
                                               kStride, kDepth);
  }
  ptx::wait_copies<0>();
  __syncthreads();  // shared memory is free again
  return sum;
}

}  // namespace driftar::cuda
