#pragma once

// Draft trees on the GPU as their launchers see them: device pointers, sizes and a stream. All
// tensors are contiguous but for the caches. No value that a pointer leads to can make a kernel
// leave its tensors.

#include "scalar.h"
#include "tree_plan.h"

#include <cuda_runtime.h>

#include <cstdint>

namespace driftar::cuda {

struct Verdict {
  int64_t* length;  // [B]
  int64_t* path;    // [B, max_depth]
  int64_t* node;    // [B]
};

struct TreeCall {
  int64_t batch, nodes, max_depth;
  const int64_t* parents;  // [B | 1, N]; a node whose parent is not -1 or an earlier one is dead
  int64_t parents_stride;  // 0 when one tree serves the batch
  Verdict verdict;
  const bool* accept;  // [B, N]; null: a node is accepted where
                       // ||draft - target|| <= tolerance
  Scalar type;
  int64_t width;
  float tolerance;
  const void *draft, *target;  // [B, N, D]
};

struct ChainCall {
  int64_t batch, count, width;
  Scalar type;
  const void *draft, *draft_mean;  // [B, K, D]
  const void* draft_std;           // [B, K]
  const void* target_mean;         // [B, K + 1, D]
  const void* target_std;          // [B, K + 1]
  const int64_t* seed;             // [1]
  int64_t* length;                 // [B]
  float* next_sample;              // [B, D]
};

struct CommitCall {
  Cache caches[2];
  int cache_count;  // of one launch; set by the launcher
  int64_t batch, heads, capacity, max_depth;
  const int64_t *key_lengths, *path, *length;  // [B], [B, max_depth], [B]
  int64_t* new_lengths;                        // [B]
};

// A residual sample is abandoned after this many proposals; see csrc/cpu/tree.h.
constexpr int64_t kMaxProposals = int64_t{1} << 20;

cudaError_t launch_walk_tree(const TreeCall& call, cudaStream_t stream);
cudaError_t launch_verify_chain(const ChainCall& call, cudaStream_t stream);
cudaError_t launch_commit_path(CommitCall call, cudaStream_t stream);

}  // namespace driftar::cuda
