// Keys and values as right operands of AMX tiles.

#include "attention_amx.h"

namespace driftar::cpu {

namespace {

using c10::BFloat16;

// Tiles of B for scores: element (p, j) is feature p of key j, so that a pair of features stays
// together while 32-bit squares are transposed.
void pack_keys(Rows<BFloat16> keys, int64_t width, BFloat16* target) {
  for (int64_t j = 0; j < kPanelKeys; j += kTileColumns) {
    for (int64_t p = 0; p < width; p += kTileDepth, target += kTileSize) {
      at::vec::transpose_mxn<float, kTileColumns, kTileDepth / 2>(
          reinterpret_cast<const float*>(keys.at(j) + p), keys.stride / 2,
          reinterpret_cast<float*>(target), kTileColumns);
    }
  }
}

// Tiles of B for out: element (p, j) is feature j of key p.
void pack_values(Rows<BFloat16> values, int64_t width, BFloat16* target) {
  for (int64_t j = 0; j < width; j += kTileColumns, target += kTileSize) {
    for (int64_t p = 0; p < kTileDepth; p += 2) {
      const BFloat16 *even = values.at(p) + j, *odd = values.at(p + 1) + j;
      for (int64_t c = 0; c < kTileColumns; ++c) {
        target[p * kTileColumns + 2 * c] = even[c];
        target[p * kTileColumns + 2 * c + 1] = odd[c];
      }
    }
  }
}

}  // namespace

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::pack(const AttentionShape<scalar_t>& call, int64_t task,
                                          acc_t* memory) {
  static_assert(kPanelKeys == kTileDepth);
  const PackedPanels<scalar_t>& panels = call.panels;
  const int64_t panel = task % panels.count;
  const int64_t head = task / panels.count % call.key_heads;
  const int64_t b = task / panels.count / call.key_heads;
  const int64_t first = panels.first_key(panel);
  const int64_t end = std::min(panel < panels.split_panel ? panels.split_key : call.key_length,
                               visible_end(call, b, call.query_length - 1));
  const int64_t count = std::min(kPanelKeys, end - first);
  if (count <= 0) return;  // no query sees it

  const int64_t width = padded<scalar_t>(call.width);
  const int64_t value_width = padded<acc_t>(call.value_width);
  scalar_t* buffer = reinterpret_cast<scalar_t*>(memory);
  const auto load = [&](const Operand<const scalar_t>& x, int64_t features) {
    const Rows<scalar_t> rows = copy_rows(x, b, head, first, count, features, buffer);
    std::fill(buffer + count * rows.stride, buffer + kPanelKeys * rows.stride, scalar_t(0));
    return rows;
  };
  pack_keys(load(call.key, call.width), width, panels.keys + task * kPanelKeys * width);
  const Rows<scalar_t> values = load(call.value, call.value_width);
  pack_values(values, value_width, panels.values + task * kPanelKeys * value_width);
  panels.finite[task] = all_finite(values, count, call.value_width);
}

}  // namespace driftar::cpu

#include "attention_instances.h"
