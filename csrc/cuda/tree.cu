// Walk, verification and commit of draft trees (docs/ops/tree.md): one launch each.

#include "tree.h"

#include "launch.cuh"
#include "numbers.cuh"
#include "reduce.cuh"

namespace driftar::cuda {

namespace {

constexpr int kTreeThreads = 256;
constexpr int kCommitThreads = 128;
// Rows of a cache that a thread has in flight.
constexpr int kCommitRows = 4;
// Above every node's index.
constexpr int kKeyStep = static_cast<int>(kMaxNodes);

// A node during pointer doubling: the next ancestor to look at (-1 behind the root), how many nodes
// lie from here to before that ancestor, and whether one of them is dead.
struct NodeState {
  int16_t hop;
  int16_t levels;  // negated when dead
};

__device__ __forceinline__ NodeState join(NodeState lower, NodeState upper) {
  const bool dead = lower.levels < 0 || upper.levels < 0;
  const int levels = abs(lower.levels) + abs(upper.levels);
  return {upper.hop, static_cast<int16_t>(dead ? -levels : levels)};
}

// ||draft - target||^2 <= tolerance^2 of one node, by a whole warp; squares of fp32 differences are
// exact in fp64. False for NaN.
template <typename T>
__device__ bool agrees(const TreeCall& call, int64_t node, int lane) {
  const T* draft = static_cast<const T*>(call.draft) + node * call.width;
  const T* target = static_cast<const T*>(call.target) + node * call.width;
  double squared = 0;
  for (int64_t d = lane; d < call.width; d += kWarp) {
    const float difference = widen(draft[d]) - widen(target[d]);
    squared += static_cast<double>(difference) * static_cast<double>(difference);
  }
  return static_cast<float>(sqrt(warp_sum(squared))) <= call.tolerance;
}

// One block per sample. After k rounds of pointer doubling a node knows its 2^k nearest ancestors.
// Shared memory: two generations of NodeState [N], then a maximum per warp.
template <typename T>
__global__ void __launch_bounds__(kTreeThreads) walk_kernel(const TreeCall call) {
  const int64_t sample = blockIdx.x;
  const int nodes = static_cast<int>(call.nodes), thread = threadIdx.x, lane = thread % kWarp;
  const int64_t* parents = call.parents + sample * call.parents_stride;
  auto* states = static_cast<NodeState*>(shared_memory());
  auto* next = states + nodes;

  if (call.accept == nullptr) {
    for (int node = thread / kWarp; node < nodes; node += kTreeThreads / kWarp) {
      const bool accepted = agrees<T>(call, sample * nodes + node, lane);
      if (lane == 0) states[node].levels = accepted ? 1 : -1;
    }
    __syncthreads();
  }
  for (int node = thread; node < nodes; node += kTreeThreads) {
    const int64_t parent = parents[node];
    const bool proper = parent >= -1 && parent < node;
    const bool accepted =
        call.accept == nullptr ? states[node].levels > 0 : call.accept[sample * nodes + node];
    states[node] = {static_cast<int16_t>(proper ? parent : -1),
                    static_cast<int16_t>(proper && accepted ? 1 : -1)};
  }
  __syncthreads();
  for (int reach = 1; reach < nodes; reach *= 2) {
    for (int node = thread; node < nodes; node += kTreeThreads) {
      const NodeState own = states[node];
      next[node] = own.hop < 0 ? own : join(own, states[own.hop]);
    }
    __syncthreads();
    NodeState* swap = states;
    states = next;
    next = swap;
  }

  // One key orders by depth first and by lowest index second.
  int best = -1;
  for (int node = thread; node < nodes; node += kTreeThreads) {
    const int levels = states[node].levels;
    if (levels > 0 && levels <= call.max_depth) best = max(best, levels * kKeyStep - 1 - node);
  }
  auto* of_warps = static_cast<int*>(shared_memory()) + 2 * nodes;
  best = block_reduce<kTreeThreads>(best, of_warps, [](int a, int b) { return max(a, b); });
  const int length = best < 0 ? 0 : best / kKeyStep + 1;
  const int node = best < 0 ? -1 : length * kKeyStep - 1 - best;
  int64_t* path = call.verdict.path + sample * call.max_depth;
  for (int64_t step = length + thread; step < call.max_depth; step += kTreeThreads) path[step] = -1;
  if (thread == 0) {
    call.verdict.length[sample] = length;
    call.verdict.node[sample] = node;
    int64_t current = node;
    for (int step = length - 1; step >= 0; --step) {
      path[step] = current;
      current = parents[current];
    }
  }
}

// One block per head of a cache. A thread owns a column of the rows: path[step] >= step and paths
// increase, so that what a step writes is no longer read by a later one; kCommitRows steps read
// before they write.
template <typename Unit>
__global__ void __launch_bounds__(kCommitThreads) commit_kernel(const CommitCall call) {
  const int64_t heads = call.heads, task = blockIdx.x;
  const Cache& cache = call.caches[task / (call.batch * heads)];
  const int64_t sample = task / heads % call.batch, head = task % heads;
  const int64_t prefix = call.key_lengths[sample];
  const int64_t given = call.length[sample];
  const int64_t steps = given < call.max_depth ? given : call.max_depth;
  if (task < call.batch * heads && head == 0 && threadIdx.x == 0) {
    call.new_lengths[sample] = prefix + given;
  }
  if (prefix < 0 || prefix > call.capacity) return;
  const int64_t rows = call.capacity - prefix;
  const int64_t* path = call.path + sample * call.max_depth;
  auto* origin = static_cast<char*>(cache.data) + sample * cache.batch + head * cache.head +
                 prefix * cache.row;
  for (int64_t at = threadIdx.x; at * static_cast<int64_t>(sizeof(Unit)) < cache.width;
       at += kCommitThreads) {
    char* column = origin + at * cache.column;
    const auto row = [&](int64_t index) {
      return reinterpret_cast<Unit*>(column + index * cache.row);
    };
    for (int64_t first = 0; first < steps; first += kCommitRows) {
      Unit moved[kCommitRows];
      bool moves[kCommitRows];
#pragma unroll
      for (int i = 0; i < kCommitRows; ++i) {
        const int64_t step = first + i;
        const int64_t source = step < steps ? path[step] : -1;
        moves[i] = source > step && source < rows;
        if (moves[i]) moved[i] = *row(source);
      }
#pragma unroll
      for (int i = 0; i < kCommitRows; ++i) {
        if (moves[i]) *row(first + i) = moved[i];
      }
    }
  }
}

cudaError_t commit_caches(const CommitCall& call, int64_t unit, cudaStream_t stream) {
  const LaunchShape shape{call.cache_count * call.batch * call.heads, kCommitThreads};
  switch (unit) {
    case 16:
      return launch(commit_kernel<uint4>, shape, stream, call);
    case 8:
      return launch(commit_kernel<uint64_t>, shape, stream, call);
    case 4:
      return launch(commit_kernel<uint32_t>, shape, stream, call);
    default:
      return launch(commit_kernel<uint16_t>, shape, stream, call);
  }
}

}  // namespace

cudaError_t launch_walk_tree(const TreeCall& call, cudaStream_t stream) {
  const size_t shared = 2 * sizeof(NodeState) * call.nodes + kTreeThreads / kWarp * sizeof(int);
  return dispatch(call.type, [&](auto tag) {
    return launch(walk_kernel<typename decltype(tag)::type>, {call.batch, kTreeThreads, shared},
                  stream, call);
  });
}

cudaError_t launch_commit_path(CommitCall call, cudaStream_t stream) {
  int64_t units[2];
  for (int i = 0; i < 2; ++i) {
    Cache& cache = call.caches[i];
    units[i] = copy_unit(cache);
    if (cache.column == cache.element) cache.column = units[i];
  }
  call.cache_count = 2;
  if (units[0] == units[1]) return commit_caches(call, units[0], stream);
  call.cache_count = 1;
  const cudaError_t error = commit_caches(call, units[0], stream);
  if (error != cudaSuccess) return error;
  call.caches[0] = call.caches[1];
  return commit_caches(call, units[1], stream);
}

}  // namespace driftar::cuda
