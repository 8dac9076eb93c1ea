#pragma once

// Products of bf16 matrices with fp32 sums on the tile registers of AMX. Only for files compiled
// with AMX.

#include <immintrin.h>

#include <c10/util/BFloat16.h>

#include <atomic>
#include <cstdint>

namespace driftar::cpu {
namespace {

// A tile register holds 16 rows of 64 bytes: 16 x 32 elements of A, 16 x 16 sums of C, or 32 x 16
// elements of B in rows of pairs, where (p, j) lies at [p / 2][j][p % 2].
constexpr int64_t kTileRows = 16, kTileColumns = 16, kTileDepth = 32;
constexpr int64_t kTileBytes = 64;  // of a row
constexpr int64_t kTileSize = kTileDepth * kTileColumns;

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

// A right operand as tiles of B; steps in elements from tile to tile.
struct TileOperand {
  const c10::BFloat16* data;
  int64_t depth_step, column_step;
};

// c[ROWS, COLUMNS tiles] (+)= a b
template <int ROWS, int COLUMNS>
void multiply_tile_block(int64_t depth, const c10::BFloat16* a, int64_t stride_a, TileOperand b,
                         bool add, float* c, int64_t stride_c) {
  const int64_t a_bytes = stride_a * sizeof(c10::BFloat16), c_bytes = stride_c * sizeof(float);
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
    const c10::BFloat16* left = a + p * kTileDepth;
    const c10::BFloat16* right = b.data + p * b.depth_step;
    _tile_loadd(4, left, a_bytes);
    _tile_loadd(6, right, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (COLUMNS > 1) {
      _tile_loadd(7, right + b.column_step, kTileBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (ROWS > 1) {
      _tile_loadd(5, left + kTileRows * stride_a, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (ROWS > 1 && COLUMNS > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (COLUMNS > 1) _tile_stored(1, c + kTileColumns, c_bytes);
  if constexpr (ROWS > 1) _tile_stored(2, lower, c_bytes);
  if constexpr (ROWS > 1 && COLUMNS > 1) _tile_stored(3, lower + kTileColumns, c_bytes);
}

// C = A B, added to C with `add`. Sizes in tiles; A and C are row-major.
inline void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, const c10::BFloat16* a,
                           int64_t stride_a, TileOperand b, bool add, float* c, int64_t stride_c) {
  // The loads do not tell the compiler that they read memory: what was stored must be there.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  for (int64_t i = 0; i < rows; i += 2) {
    const bool two_rows = i + 1 < rows;
    const c10::BFloat16* left = a + i * kTileRows * stride_a;
    for (int64_t j = 0; j < columns; j += 2) {
      const bool two_columns = j + 1 < columns;
      const auto block = two_rows
                             ? two_columns ? multiply_tile_block<2, 2> : multiply_tile_block<2, 1>
                         : two_columns ? multiply_tile_block<1, 2>
                                       : multiply_tile_block<1, 1>;
      block(depth, left, stride_a, {b.data + j * b.column_step, b.depth_step, b.column_step}, add,
            c + i * kTileRows * stride_c + j * kTileColumns, stride_c);
    }
  }
}

}  // namespace
}  // namespace driftar::cpu
