#pragma once

// What the host decides about the drift kernels: plain C++, so that any machine can test it.

#include "../common/host_device.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace driftar::cuda {

constexpr int kMaxTemperatures = 16;

// Rows of a panel of distances: whole tiles.
inline int64_t panel_rows(int64_t batch, int64_t generated, int64_t points, int64_t elements) {
  constexpr int64_t kTile = 64;
  const int64_t rows = elements / std::max<int64_t>(batch * points, 1) / kTile * kTile;
  return std::min(std::max(rows, kTile), generated);
}

// Many small problems: a block holds one, while its points stream by kBatchDepth features at a
// time.
constexpr int kBatchWarps = 8, kBatchThreads = 32 * kBatchWarps, kBatchDepth = 32;
// Rows and columns of a problem are padded to this.
constexpr int kBatchTile = 32;
// Strides of a chunk of points for which the lanes of a fragment fall into different banks: points
// as rows of both operands, or as rows of the second one of a plain product.
constexpr int kBatchRowStride = kBatchDepth + 4, kBatchColumnStride = kBatchDepth + 8;

// What such a block holds: so many rows and points, padded, and rows of pairs `stride` apart.
struct BatchShape {
  int rows, points, stride;

  DRIFTAR_HOST_DEVICE BatchShape(int64_t generated, int64_t count)
      : rows(padded(generated)), points(padded(count)), stride(points + 4) {}

  static DRIFTAR_HOST_DEVICE int padded(int64_t count) {
    return static_cast<int>((count + kBatchTile - 1) / kBatchTile * kBatchTile);
  }

  // Shared memory: `sets` matrices [rows, stride], a chunk of the points as they lie in memory and
  // centred, two vectors of rows and of points, a value per thread, and one per warp and
  // temperature.
  size_t shared_bytes(int sets) const {
    const size_t vectors = 2 * (rows + points) + kBatchThreads + kBatchWarps * kMaxTemperatures;
    return sizeof(float) * (static_cast<size_t>(sets) * rows * stride +
                            points * (kBatchDepth + kBatchColumnStride) + vectors);
  }
};

// How many temperatures' coefficients a block holds beside the distances: as few passes over the
// points as shared memory allows. 0: it cannot hold the problem, or there are too few problems to
// keep the multiprocessors busy.
inline int temperatures_together(int64_t batch, int64_t generated, int64_t points, int temperatures,
                                 int multiprocessors, size_t shared_limit) {
  if (2 * batch < multiprocessors || static_cast<size_t>(points) > shared_limit) return 0;
  const BatchShape shape(generated, points);
  const size_t alone = shape.shared_bytes(1), set = alone - shape.shared_bytes(0);
  if (alone + set > shared_limit) return 0;
  const int most = static_cast<int>((shared_limit - alone) / set);
  const int passes = std::max((temperatures + most - 1) / most, 1);
  return std::max((temperatures + passes - 1) / passes, 1);
}

}  // namespace driftar::cuda
