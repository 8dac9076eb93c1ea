#pragma once

// Products of bf16 matrices with fp32 sums on the tile registers of AMX. Only for files compiled
// with AMX.

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace driftar::cpu {
namespace {

// A tile register holds 16 rows of 64 bytes: 16 x 32 elements of A, 16 x 16 sums of C, or 32 x 16
// elements of B in rows of pairs, where (p, j) lies at [p / 2][j][p % 2].
constexpr int64_t kTileRows = 16, kTileColumns = 16, kTileDepth = 32;
constexpr int64_t kTileBytes = 64;  // of a row
constexpr int64_t kTileSize = kTileDepth * kTileColumns;

constexpr int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Palette 1, and the size of each of the eight registers.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// A constant: compilers know only of the first bytes that the instruction reads.
constexpr TileShapes kTileShapes;

// The calling thread's tile registers are in use while this lives. Configured registers would cost
// every later context switch 8 KB.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&kTileShapes); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// An operand in tiles; steps in bytes.
struct Tiles {
  const char* data;
  int64_t row;            // from row to row of a tile
  int64_t depth, across;  // from tile to tile along the depth and along rows of A or columns of B

  Tiles(const void* first, int64_t row_step, int64_t depth_step, int64_t across_step)
      : data(static_cast<const char*>(first)),
        row(row_step),
        depth(depth_step),
        across(across_step) {}

  Tiles from(int64_t tile) const { return {data + tile * across, row, depth, across}; }
  Tiles deeper(int64_t tile) const { return {data + tile * depth, row, depth, across}; }
};

// c[ROWS, COLUMNS tiles] (+)= a b
template <int ROWS, int COLUMNS>
void multiply_tile_block(int64_t depth, Tiles a, Tiles b, bool add, float* c, int64_t stride_c) {
  const int64_t c_bytes = stride_c * sizeof(float);
  float* const lower = c + kTileRows * stride_c;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (COLUMNS > 1) _tile_loadd(1, c + kTileColumns, c_bytes);
    if constexpr (ROWS > 1) _tile_loadd(2, lower, c_bytes);
    if constexpr (ROWS > 1 && COLUMNS > 1) _tile_loadd(3, lower + kTileColumns, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (COLUMNS > 1) _tile_zero(1);
    if constexpr (ROWS > 1) _tile_zero(2);
    if constexpr (ROWS > 1 && COLUMNS > 1) _tile_zero(3);
  }
  for (int64_t p = 0; p < depth; ++p) {
    const char* left = a.data + p * a.depth;
    const char* right = b.data + p * b.depth;
    _tile_loadd(4, left, a.row);
    _tile_loadd(6, right, b.row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (COLUMNS > 1) {
      _tile_loadd(7, right + b.across, b.row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (ROWS > 1) {
      _tile_loadd(5, left + a.across, a.row);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (ROWS > 1 && COLUMNS > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (COLUMNS > 1) _tile_stored(1, c + kTileColumns, c_bytes);
  if constexpr (ROWS > 1) _tile_stored(2, lower, c_bytes);
  if constexpr (ROWS > 1 && COLUMNS > 1) _tile_stored(3, lower + kTileColumns, c_bytes);
}

// C = A B, added to C with `add`. Sizes in tiles; C is row-major. Calls between() before every
// block of two tiles of rows and of columns.
template <typename Between>
void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, Tiles a, Tiles b, bool add,
                    float* c, int64_t stride_c, const Between& between) {
  // The loads do not tell the compiler that they read memory: what was stored must be there.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  const auto strip = [&](auto width, int64_t j) {
    constexpr int COLUMNS = decltype(width)::value;
    float* own = c + j * kTileColumns;
    const Tiles right = b.from(j);
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) {
      between();
      multiply_tile_block<2, COLUMNS>(depth, a.from(i), right, add, own + i * kTileRows * stride_c,
                                      stride_c);
    }
    if (i < rows) {
      multiply_tile_block<1, COLUMNS>(depth, a.from(i), right, add, own + i * kTileRows * stride_c,
                                      stride_c);
    }
  };
  int64_t j = 0;
  for (; j + 2 <= columns; j += 2) strip(std::integral_constant<int, 2>{}, j);
  if (j < columns) strip(std::integral_constant<int, 1>{}, j);
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

}  // namespace
}  // namespace driftar::cpu
