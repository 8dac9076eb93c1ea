#pragma once

// Draft trees on the CPU as their kernels see them: raw pointers and sizes.

#include "../common/accumulate.h"
#include "isa.h"

#include <cstddef>
#include <cstdint>

namespace driftar::cpu {

struct WalkCall {
  int64_t nodes, max_depth;
  const int64_t* parents;  // [B | 1, N], each -1 or an earlier node
  int64_t parents_batch;   // 0 when one tree serves the batch
  const bool* accept;      // [B, N]; not read by verify
  int64_t* length;         // [B]
  int64_t* path;           // [B, max_depth]
  int64_t* node;           // [B]
};

template <typename scalar_t>
struct VerifyCall {
  WalkCall walk;
  int64_t width;
  accumulate_t<scalar_t> tolerance;
  const scalar_t *draft, *target;  // [B, N, D], contiguous
};

// Contiguous; shapes as in the Python function.
template <typename scalar_t>
struct ChainCall {
  int64_t count, width;
  const scalar_t *draft, *draft_mean, *draft_std, *target_mean, *target_std;
  uint64_t seed;
  int64_t* length;      // [B]
  double* next_sample;  // [B, D]
};

// One cache [B, H, Lmax, D] of any dtype; element size and strides in bytes. Rows of D elements are
// moved as one piece when `column` is the element size.
struct CommitCall {
  std::byte* cache;
  int64_t heads, width, element, batch, head, row, column;
  int64_t max_depth;
  const int64_t *key_lengths, *path, *length;  // [B], [B, max_depth], [B]
};

// A residual sample is abandoned after this many proposals; the emitted distribution then differs
// from the target's by at most 1 / (e kMaxProposals) in total variation.
constexpr int64_t kMaxProposals = int64_t{1} << 20;

template <Isa isa>
struct TreeKernel {
  // Sample b; level [N] is scratch. Returns false when a surviving path is longer than max_depth.
  static bool walk(const WalkCall& call, int64_t b, int64_t* level);

  // The same, where a node is accepted if ||draft - target|| <= tolerance. Most nodes of a tree die
  // with an ancestor, and are not looked at.
  template <typename scalar_t>
  static bool verify(const VerifyCall<scalar_t>& call, int64_t b, int64_t* level);

  // Sample b.
  template <typename scalar_t>
  static void verify_chain(const ChainCall<scalar_t>& call, int64_t b);

  // The heads [begin, end) of [B * H].
  static void commit(const CommitCall& call, int64_t begin, int64_t end);
};

}  // namespace driftar::cpu
