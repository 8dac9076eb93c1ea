#pragma once

// The same on AMX, for bf16: rows as they are, keys and values from panels that all query blocks
// share, weights rounded to bf16, sums in fp32. Only for kernel files compiled with AMX.

#include "amx.h"
#include "attention_operands.h"

namespace driftar::cpu {
namespace {

struct AmxProducts {
  using scalar_t = c10::BFloat16;
  static constexpr int64_t strip_rows = 2 * kTileRows;
  static constexpr int64_t written_rows(int64_t rows) { return tiles(rows, kTileRows) * kTileRows; }
  static constexpr int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

  TileRegisters registers;
  const QueryBlock<scalar_t>& block;
  const AttentionShape<scalar_t>& shape;
  int64_t key_block, width, value_width;
  // [written rows, width] and [strip_rows, key_block]. Tiles take in rows behind those of the
  // block, whatever they hold: nobody reads what they give.
  scalar_t *queries, *weights;
  scalar_t* value_buffer;
  Tile tile{};
  TileOperand keys{}, values{};
  bool guarded = false;

  AmxProducts(const QueryBlock<scalar_t>& query_block, int64_t keys_per_tile,
              Scratch<float>& scratch)
      : block(query_block),
        shape(query_block.shape),
        key_block(keys_per_tile),
        width(padded<scalar_t>(shape.width)),
        value_width(padded<float>(shape.value_width)) {
    const int64_t rows = written_rows(block.count());
    queries = scratch.take_as<scalar_t>(rows * width);
    weights = scratch.take_as<scalar_t>(strip_rows * key_block);
    value_buffer = scratch.take_as<scalar_t>(key_block * padded<scalar_t>(shape.value_width));
    for (int64_t h = 0; h < block.heads; ++h) {
      copy_rows(shape.query, block.b, block.head + h, block.row, block.rows, shape.width,
                queries + h * block.rows * width);
    }
  }

  void load(const Tile& next) {
    tile = next;
    const PackedPanels<scalar_t>& panels = shape.panels;
    const int64_t head = block.b * shape.key_heads + block.key_head();
    const int64_t first = head * panels.count + panels.panel_of(tile.column);
    keys = {panels.keys + first * kPanelKeys * width, kTileSize, width / kTileDepth * kTileSize};
    values = {panels.values + first * kPanelKeys * value_width,
              value_width / kTileColumns * kTileSize, kTileSize};
    const int64_t count = tiles(tile.columns, kPanelKeys);
    // Keys behind the tile in its last panel are there for later blocks, so this one is partial.
    guarded = is_partial(block, tile) &&
              !std::all_of(panels.finite + first, panels.finite + first + count,
                           [](uint8_t finite) { return finite != 0; });
    if (guarded) {
      copy_rows(shape.value, block.b, block.key_head(), tile.column, tile.columns,
                shape.value_width, value_buffer);
    }
  }

  void multiply_keys(const Strip& strip, float* scores) const {
    const int64_t columns = tiles(strip.columns, kTileColumns);
    multiply_tiles(tiles(strip.rows, kTileRows), columns, width / kTileDepth,
                   queries + strip.first * width, width, keys, /*add=*/false, scores, key_block);
    const Vector<float> scale(shape.scale);
    for (int64_t r = 0; r < strip.rows; ++r) {
      float* row = scores + r * key_block;
      for (int64_t j = 0; j < columns * kTileColumns; j += Vector<float>::size()) {
        (Vector<float>::loadu(row + j) * scale).store(row + j);
      }
    }
  }

  void multiply_values(const Strip& strip, const float* exponentials, float* out,
                       int64_t out_stride) const {
    if (guarded) {
      accumulate_seen(
          strip.rows, value_width, strip.columns, Strided<float>{exponentials, key_block, 1},
          Rows<scalar_t>{value_buffer, padded<scalar_t>(shape.value_width)}, out, out_stride);
      return;
    }
    for (int64_t r = 0; r < strip.rows; ++r) {
      narrow(exponentials + r * key_block, whole_vectors<float>(strip.columns),
             weights + r * key_block);
    }
    multiply_tiles(tiles(strip.rows, kTileRows), value_width / kTileColumns,
                   tiles(strip.columns, kTileDepth), weights, key_block, values, /*add=*/true, out,
                   out_stride);
  }
};

}  // namespace
}  // namespace driftar::cpu
