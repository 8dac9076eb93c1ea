// What the host decides about launches, for its tests.

#include "../../../csrc/cuda/attention_plan.h"
#include "../../../csrc/cuda/drift_plan.h"
#include "../../../csrc/cuda/tree_plan.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

using namespace driftar::cuda;

EXPORTED int splits(int64_t blocks, int64_t keys, int columns, int multiprocessors, int* each) {
  const KeySplit split = split_keys(blocks, keys, columns, multiprocessors);
  *each = split.keys;
  return split.splits;
}

EXPORTED int width(int columns, int bytes) { return padded_width(columns, bytes); }

EXPORTED int stages(int padded, int bytes) { return key_stages(padded, bytes); }

EXPORTED int64_t attention_bytes(int padded, int bytes, int stages) {
  return static_cast<int64_t>(forward_shared_bytes(padded, bytes, stages));
}

EXPORTED int64_t copied_unit(int64_t address, int64_t width, int64_t element, int64_t row,
                             int64_t column) {
  return copy_unit({reinterpret_cast<void*>(address), width, element, row, row, row, column});
}

EXPORTED int64_t panel(int64_t batch, int64_t generated, int64_t points, int64_t elements) {
  return panel_rows(batch, generated, points, elements);
}

EXPORTED int together(int64_t batch, int64_t generated, int64_t points, int temperatures,
                      int multiprocessors, int64_t shared_limit) {
  return temperatures_together(batch, generated, points, temperatures, multiprocessors,
                               static_cast<size_t>(shared_limit));
}

EXPORTED int64_t batch_bytes(int64_t generated, int64_t points, int sets) {
  return static_cast<int64_t>(BatchShape(generated, points).shared_bytes(sets));
}
