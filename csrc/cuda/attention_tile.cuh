#pragma once

// Tiles of attention: operands in shared memory, products of a warp's 16 rows, visibility, row
// statistics.

#include "attention.h"
#include "launch.cuh"
#include "numbers.cuh"
#include "reduce.cuh"

namespace driftar::cuda {

constexpr int kAttentionThreads = kQueryRows / 16 * kWarp;
constexpr float kLog2E = 1.4426950408889634f;
// Differences of scores below this count as this: their weight is 0, and 0 * -inf must not be NaN.
constexpr float kFarBelow = -1e4f;

template <typename T, int width>
constexpr int kSharedStride = shared_stride(width, sizeof(T));

// Copies `rows` rows of `width` padded columns. row_offset(r) is where row r starts, relative to
// the data, or negative for a row of zeros.
template <typename T, int width, int rows, typename RowOffset>
__device__ __forceinline__ void load_rows(T* target, const Operand& from, int columns,
                                          RowOffset&& row_offset) {
  constexpr int kCount = 16 / sizeof(T), kPerRow = width / kCount;
  const T* data = static_cast<const T*>(from.data);
  for (int at = threadIdx.x; at < rows * kPerRow; at += kAttentionThreads) {
    const int r = at / kPerRow, first = at % kPerRow * kCount;
    const int64_t offset = row_offset(r);
    const int count = offset < 0 ? 0 : max(0, min(kCount, columns - first));
    T* own = target + r * kSharedStride<T, width> + first;
    if (from.vectors) {
      const T* source = count > 0 ? data + offset + first : data;
      ptx::copy_async(own, source, count * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        own[i] = i < count ? data[offset + (first + i) * from.column] : narrow<T>(0.0f);
      }
    }
  }
}

// Products of one warp: rows [16, width] of queries, keys and values [8 fragments, width] in shared
// memory; C fragments as in ptx.cuh.
template <typename T, int width, int fragments>
struct WarpProduct {
  static constexpr int kStride = kSharedStride<T, width>;

  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    if constexpr (std::is_same_v<T, Bf16>) {
      ptx::mma_bf16(c, a, b);
    } else {
      ptx::mma_fp16(c, a, b);
    }
  }

  // scores += queries keys^T
  static __device__ __forceinline__ void scores(const T* queries, const T* keys,
                                                float (&sum)[fragments][4]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int d = 0; d < width; d += 16) {
      uint32_t a[4];
      ptx::load_matrices(a, queries + lane % 16 * kStride + d + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < fragments; n += 2) {
        uint32_t b[4];
        const int key = n * 8 + lane % 8 + lane / 16 * 8;
        ptx::load_matrices(b, keys + key * kStride + d + lane / 8 % 2 * 8);
        multiply(sum[n], a, b[0], b[1]);
        multiply(sum[n + 1], a, b[2], b[3]);
      }
    }
  }

  // out += weights values; the weights are C fragments, which 16-bit A fragments continue.
  static __device__ __forceinline__ void outputs(const float (&weights)[fragments][4],
                                                 const T* values, float (&out)[width / 8][4]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < fragments; n += 2) {
      const uint32_t a[4] = {pack<T>(weights[n][0], weights[n][1]),
                             pack<T>(weights[n][2], weights[n][3]),
                             pack<T>(weights[n + 1][0], weights[n + 1][1]),
                             pack<T>(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
      for (int d = 0; d < width; d += 16) {
        uint32_t b[4];
        ptx::load_matrices_transposed(b,
                                      values + (n * 8 + lane % 16) * kStride + d + lane / 16 * 8);
        multiply(out[d / 8], a, b[0], b[1]);
        multiply(out[d / 8 + 1], a, b[2], b[3]);
      }
    }
  }
};

// fp32 by three products of tf32, see product.cuh.
template <int width, int fragments>
struct WarpProduct<float, width, fragments> {
  static constexpr int kStride = kSharedStride<float, width>;

  struct Split {
    uint32_t high[4], low[4];
  };

  static __device__ __forceinline__ Split split(const float (&x)[4]) {
    Split result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      result.high[i] = ptx::round_tf32(x[i]);
      result.low[i] = ptx::round_tf32(x[i] - __uint_as_float(result.high[i]));
    }
    return result;
  }

  // c += a b; `exact` keeps what two halves of b leave, so that a weight of 1 gives b itself.
  template <bool exact>
  static __device__ __forceinline__ void multiply(float (&c)[4], const Split& a, float b0,
                                                  float b1) {
    const float b[2] = {b0, b1};
    uint32_t high[2], low[2], least[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = ptx::round_tf32(b[i]);
      const float rest = b[i] - __uint_as_float(high[i]);
      low[i] = ptx::round_tf32(rest);
      least[i] = ptx::round_tf32(rest - __uint_as_float(low[i]));
    }
    // Summed apart: a long sum in the accumulator alone would lose what the halves have gained.
    float part[4] = {};
    if constexpr (exact) ptx::mma_tf32(part, a.high, least);
    ptx::mma_tf32(part, a.low, high);
    ptx::mma_tf32(part, a.high, low);
    ptx::mma_tf32(part, a.high, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += part[i];
  }

  static __device__ __forceinline__ void scores(const float* queries, const float* keys,
                                                float (&sum)[fragments][4]) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 2
    for (int d = 0; d < width; d += 8) {
      const float* q = queries + g * kStride + d + t;
      const Split a = split({q[0], q[8 * kStride], q[4], q[8 * kStride + 4]});
#pragma unroll
      for (int n = 0; n < fragments; ++n) {
        const float* k = keys + (n * 8 + g) * kStride + d + t;
        multiply<false>(sum[n], a, k[0], k[4]);
      }
    }
  }

  // A C fragment holds columns 2 t and 2 t + 1 where an A fragment holds t and t + 4: the keys are
  // taken in that order.
  static __device__ __forceinline__ void outputs(const float (&weights)[fragments][4],
                                                 const float* values, float (&out)[width / 8][4]) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < fragments; ++n) {
      const Split a = split({weights[n][0], weights[n][2], weights[n][1], weights[n][3]});
      const float* v = values + (n * 8 + 2 * t) * kStride + g;
#pragma unroll
      for (int d = 0; d < width; d += 8) multiply<true>(out[d / 8], a, v[d], v[d + kStride]);
    }
  }
};

// One query row: where it lies and what it sees.
struct Row {
  bool there;
  int query, head;
  int bound;                  // keys before it are visible; behind it, with a tree, ancestors
  const uint32_t* ancestors;  // its bits, or null
  const char* mask;           // its row, or null
};

// A sample as its rows see it.
struct Sample {
  const AttentionShape& shape;
  int64_t b;
  int length, offset;

  __device__ Sample(const AttentionShape& shape, int64_t b) : shape(shape), b(b) {
    length = shape.key_length - (shape.ancestors == nullptr ? 0 : shape.query_length);
    if (shape.key_lengths != nullptr) length = clamped(shape.key_lengths[b], 0, length);
    offset = shape.query_offset;
    if (shape.query_offsets != nullptr) {
      offset = clamped(shape.query_offsets[b], -shape.query_length - 1, shape.key_length);
    }
  }

  static __device__ int clamped(int64_t value, int low, int high) {
    return static_cast<int>(value < low ? low : value > high ? high : value);
  }

  __device__ int bound(int query) const {
    return shape.is_causal ? max(0, min(length, query + offset + 1)) : length;
  }

  // Keys that queries up to `query` can see lie before it.
  __device__ int key_end(int query) const {
    return shape.ancestors == nullptr ? bound(query) : length + shape.query_length;
  }

  __device__ Row row(int query, int head, bool there) const {
    Row result{there, query, head, there ? bound(query) : 0, nullptr, nullptr};
    if (shape.ancestors != nullptr && there) {
      result.ancestors =
          shape.ancestors + b * shape.ancestors_stride + static_cast<int64_t>(query) * shape.words;
    }
    if (shape.mask.kind != MaskKind::none && there) {
      const int64_t size = shape.mask.kind == MaskKind::boolean ? 1 : sizeof(float);
      result.mask = static_cast<const char*>(shape.mask.data) +
                    size * (b * shape.mask.batch + head * shape.mask.head + query * shape.mask.row);
    }
    return result;
  }

  // The score of a row's product with key j; -inf where it does not see the key.
  __device__ __forceinline__ float score(const Row& row, int j, float product) const {
    bool visible = j < row.bound;
    if (row.ancestors != nullptr && j >= length && j < length + shape.query_length) {
      const int node = j - length;
      visible = row.ancestors[node / 32] >> (node % 32) & 1u;
    }
    if (!visible) return -INFINITY;
    const float scaled = product * shape.scale;
    if (row.mask == nullptr) return scaled;
    const int64_t at = j * shape.mask.column;
    if (shape.mask.kind == MaskKind::boolean) return row.mask[at] != 0 ? scaled : -INFINITY;
    const float added = reinterpret_cast<const float*>(row.mask)[at];
    return added == -INFINITY ? added : scaled + added;
  }
};

// (m, l, t) of csrc/common/online_softmax.h in fp32; m ignores NaN, which l and t do not.
struct Statistics {
  float maximum = -INFINITY, total = 0, moment = 0;

  static __device__ __forceinline__ float shift(float maximum) {
    return maximum == -INFINITY ? 0.0f : maximum;
  }

  // The weight of a score, and its contribution to the sums.
  __device__ __forceinline__ float add(float score) {
    const float below = score - shift(maximum);
    const float weight = ptx::exp2(below * kLog2E);
    total += weight;
    moment += weight * fmaxf(below, kFarBelow);
    return weight;
  }

  // Re-expresses the sums relative to a new, not smaller maximum; returns their factor.
  __device__ __forceinline__ float raise(float new_maximum) {
    const float below = maximum - shift(new_maximum);
    const float factor = ptx::exp2(below * kLog2E);
    moment = factor * (moment + fmaxf(below, kFarBelow) * total);
    total *= factor;
    maximum = new_maximum;
    return factor;
  }

  __device__ __forceinline__ void join(Statistics other) {
    const float both = fmaxf(maximum, other.maximum);
    raise(both), other.raise(both);
    total += other.total, moment += other.moment;
  }

  __device__ float largest() const {
    return total != total ? total : total == 0 ? -INFINITY : maximum;
  }
  __device__ float lse() const { return total == 0 ? -INFINITY : maximum + logf(total); }
  __device__ float entropy() const { return total == 0 ? 0.0f : logf(total) - moment / total; }
};

// Over the four lanes that share a row.
template <typename Join>
__device__ __forceinline__ float row_reduce(float value, Join&& join) {
  value = join(value, __shfl_xor_sync(kWholeWarp, value, 1));
  return join(value, __shfl_xor_sync(kWholeWarp, value, 2));
}

__device__ __forceinline__ float row_sum(float value) {
  return row_reduce(value, [](float a, float b) { return a + b; });
}

// 1 / log |E|, or 1 without normalisation; 0 where there is nothing to choose between.
__device__ __forceinline__ float entropy_norm(float support, bool normalize) {
  return support < 2 ? 0.0f : normalize ? 1.0f / logf(support) : 1.0f;
}

// Calls visit(width) with the padded head dimension as a compile-time constant.
template <typename T, typename Visit>
decltype(auto) dispatch_width(int width, Visit&& visit) {
  const int padded = padded_width(width, sizeof(T));
  if constexpr (sizeof(T) == 2) {
    if (padded == 80) return visit(std::integral_constant<int, 80>{});
    if (padded == 96) return visit(std::integral_constant<int, 96>{});
  }
  if (padded == 64) return visit(std::integral_constant<int, 64>{});
  if (padded == 128) return visit(std::integral_constant<int, 128>{});
  return visit(std::integral_constant<int, 256>{});
}

}  // namespace driftar::cuda
