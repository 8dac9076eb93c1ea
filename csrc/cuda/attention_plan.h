#pragma once

// What the host decides about the attention kernels: plain C++, so that any machine can test it.

#include "../common/host_device.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace driftar::cuda {

// Rows of a tile: queries of the heads that share a key head, packed.
constexpr int kQueryRows = 64;

// Head dimensions are padded to one of these; `bytes` of an element.
constexpr int padded_width(int width, int bytes) {
  if (width <= 64) return 64;
  if (bytes == 2 && width <= 96) return width <= 80 ? 80 : 96;
  return width <= 128 ? 128 : 256;
}

// Keys of a tile: as many as registers and shared memory allow.
DRIFTAR_HOST_DEVICE constexpr int key_columns(int padded, int bytes) {
  return bytes == 4 || padded > 128 ? 16 : 64;
}

// Rows in shared memory are so many elements apart that the lanes of a fragment fall into different
// banks.
DRIFTAR_HOST_DEVICE constexpr int shared_stride(int padded, int bytes) {
  return padded + 16 / bytes;
}

// Shared memory of the pass over the keys with so many tiles of keys, and of values, in flight.
DRIFTAR_HOST_DEVICE constexpr size_t forward_shared_bytes(int padded, int bytes, int stages) {
  const int rows = kQueryRows + 2 * stages * key_columns(padded, bytes);
  return static_cast<size_t>(bytes) * rows * shared_stride(padded, bytes);
}

// As many stages as leave room for two blocks on a multiprocessor of sm_80 (164 KB, of which the
// driver takes 1 KB a block), which registers allow as well.
DRIFTAR_HOST_DEVICE constexpr int key_stages(int padded, int bytes) {
  constexpr int kMostStages = 3;
  constexpr size_t kRoom = (size_t{164} / 2 - 1) << 10;
  int stages = 1;
  while (stages < kMostStages && forward_shared_bytes(padded, bytes, stages + 1) <= kRoom) ++stages;
  return stages;
}

struct KeySplit {
  int splits;
  int keys;  // of each, whole tiles
};

// Splits the keys where the queries alone leave multiprocessors idle.
inline KeySplit split_keys(int64_t blocks, int64_t key_length, int columns, int multiprocessors) {
  constexpr int64_t kMostSplits = 64, kLeastTiles = 4;
  const int64_t tiles = std::max<int64_t>((key_length + columns - 1) / columns, 1);
  const int64_t wanted = std::max<int64_t>(2 * multiprocessors / std::max<int64_t>(blocks, 1), 1);
  const int64_t most = std::clamp<int64_t>(tiles / kLeastTiles, 1, kMostSplits);
  const int64_t each = (tiles + std::min(wanted, most) - 1) / std::min(wanted, most);
  return {static_cast<int>((tiles + each - 1) / each), static_cast<int>(each) * columns};
}

}  // namespace driftar::cuda
