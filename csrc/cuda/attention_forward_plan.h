#pragma once

// What the host decides about the forward pass of attention: the kernel, and how the keys are
// split.

#include "attention.h"

namespace driftar::cuda {

struct GpuTraits {
  int capability;  // ten times the major plus the minor number, e.g. 90
  int multiprocessors;
};

struct ForwardPlan {
  bool hopper;  // launch_attention_forward_hopper, else launch_attention_forward
  KeySplit split;
};

// Rows of a block of the Hopper kernel: queries of the heads that share a key head, packed, in
// whole queries; and keys of its tiles.
constexpr int kHopperRows = 128, kHopperColumns = 128, kHopperMaxWidth = 128;

inline int64_t hopper_group(const AttentionShape& shape) {
  return shape.query_heads / shape.key_heads;
}

inline int64_t hopper_queries(const AttentionShape& shape) {
  return kHopperRows / hopper_group(shape);
}

inline int64_t hopper_blocks(const AttentionShape& shape) {
  const int64_t queries = hopper_queries(shape);
  return shape.batch * shape.key_heads * ((shape.query_length + queries - 1) / queries);
}

// Whether tiles of an operand [B, H, L, D] of 16 bits can be copied in bulk as it lies: aligned
// rows, and no dimension that repeats itself.
inline bool copies_in_bulk(const Operand& x, int64_t batch, int64_t heads, int64_t length) {
  constexpr int64_t kMostBytes = int64_t{1} << 40;
  const auto fits = [&](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && 2 * stride < kMostBytes);
  };
  return x.vectors && fits(batch, x.batch) && fits(heads, x.head) && fits(length, x.row);
}

// The wgmma kernel is for capability 9.0 alone: its instructions have no successors. Only shapes
// decide, so that equal calls give equal bits; operands that cannot be copied in bulk as they lie
// are to be made contiguous.
inline bool suits_hopper(const AttentionShape& shape, int capability) {
  const auto suits = [](int width) {
    return width > 0 && width % 8 == 0 && width <= kHopperMaxWidth;
  };
  return capability == 90 && shape.type != Scalar::fp32 && shape.mask.kind == MaskKind::none &&
         shape.ancestors == nullptr && shape.scale > 0 && suits(shape.width) &&
         suits(shape.value_width) && shape.key_length > 0 && hopper_group(shape) <= kHopperRows;
}

inline ForwardPlan plan_forward(const AttentionShape& shape, const GpuTraits& gpu) {
  if (suits_hopper(shape, gpu.capability)) {
    // One block fills a multiprocessor.
    return {true, split_keys(2 * hopper_blocks(shape), shape.key_length, kHopperColumns,
                             gpu.multiprocessors)};
  }
  const int bytes = shape.type == Scalar::fp32 ? 4 : 2;
  const int columns =
      key_columns(padded_width(std::max(shape.width, shape.value_width), bytes), bytes);
  return {false, split_keys(query_blocks(shape), shape.key_length, columns, gpu.multiprocessors)};
}

// One block per hopper_blocks and split; errors of the descriptions of tensors are its own.
cudaError_t launch_attention_forward_hopper(const AttentionForward& call, cudaStream_t stream);

}  // namespace driftar::cuda
