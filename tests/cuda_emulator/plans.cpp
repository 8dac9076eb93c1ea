// What the host decides about launches, for its tests.

#include "../../csrc/cuda/attention.h"
#include "../../csrc/cuda/drift.h"
#include "../../csrc/cuda/tree.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

using namespace driftar::cuda;

EXPORTED int driftar_plan_splits(int64_t blocks, int64_t keys, int columns, int multiprocessors,
                                 int* each) {
  const KeySplit split = split_keys(blocks, keys, columns, multiprocessors);
  *each = split.keys;
  return split.splits;
}

EXPORTED int driftar_plan_width(int width) { return padded_width(width); }

EXPORTED int64_t driftar_plan_copy_unit(int64_t address, int64_t width, int64_t element,
                                        int64_t row, int64_t column) {
  return copy_unit({reinterpret_cast<void*>(address), width, element, row, row, row, column});
}

EXPORTED int64_t driftar_plan_panel(int64_t batch, int64_t generated, int64_t points,
                                    int64_t elements) {
  return panel_rows(batch, generated, points, elements);
}
