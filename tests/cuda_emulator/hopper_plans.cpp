// What the host decides about the forward pass of attention, for its tests.

#include "../../csrc/cuda/attention_forward_plan.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

using namespace driftar::cuda;

// 1 if the call takes the Hopper kernel; `splits` of the keys and keys of `each`.
EXPORTED bool driftar_plan_forward(int capability, int multiprocessors, const int64_t* sizes,
                                   int scalar, bool masked, bool tree, float scale, int* splits,
                                   int* each) {
  static const uint32_t kAncestors = 0;
  AttentionShape shape{};
  shape.batch = sizes[0], shape.query_heads = sizes[1], shape.key_heads = sizes[2];
  shape.query_length = static_cast<int>(sizes[3]), shape.key_length = static_cast<int>(sizes[4]);
  shape.width = static_cast<int>(sizes[5]), shape.value_width = static_cast<int>(sizes[6]);
  shape.type = static_cast<Scalar>(scalar);
  shape.scale = scale;
  if (masked) shape.mask.kind = MaskKind::boolean;
  if (tree) shape.ancestors = &kAncestors;
  const ForwardPlan plan = plan_forward(shape, {capability, multiprocessors});
  *splits = plan.split.splits, *each = plan.split.keys;
  return plan.hopper;
}

EXPORTED bool driftar_plan_copies_in_bulk(int64_t heads, int64_t head_stride, bool vectors) {
  return copies_in_bulk({nullptr, 0, head_stride, 64, 1, vectors}, 1, heads, 10);
}
