// Gradients of attention with row entropies: one kernel per side, no atomics, so that results are
// bitwise repeatable. Formulas: docs/ops/attention.md.

#include "attention_tile.cuh"

namespace driftar::cuda {

namespace {

// Rows that stream past a block's 64: as many as registers and shared memory allow; `bytes` of an
// element.
__host__ __device__ constexpr int streamed(int width, int bytes) {
  return (width > 128 ? 16 : 32) / (bytes / 2);
}

template <typename T, int width>
constexpr size_t kGradientShared =
    sizeof(T) * 2 * (kQueryRows + streamed(width, sizeof(T))) * kSharedStride<T, width>;

// What the gradient of a row of scores depends on.
struct RowGradient {
  float lse, delta, weight, member_lse, cross;
};

__device__ __forceinline__ RowGradient load_row(const AttentionBackward& call, const Sample& sample,
                                                const Row& row) {
  RowGradient result{};
  if (!row.there) return result;
  const int64_t index = (sample.b * call.query_heads + row.head) * call.query_length + row.query;
  result.lse = call.lse[index], result.delta = call.delta[index];
  if (call.entropy == EntropyKind::none) return result;
  const bool map = call.entropy == EntropyKind::map;
  result.weight = map ? call.entropy_weight[sample.b * call.query_length + row.query] /
                            static_cast<float>(call.query_heads)
                      : call.entropy_weight[index];
  result.member_lse = call.entropy_lse[index], result.cross = call.entropy_cross[index];
  return result;
}

// Turns a score into the weight p and the product <grad_out, v> into
// dS = p (<grad_out, v> - delta) - w q (log pi - c).
__device__ __forceinline__ void differentiate(const RowGradient& row, bool member, bool map,
                                              float logarithm, float& score, float& product) {
  if (score == -INFINITY) {
    score = product = 0;
    return;
  }
  const float weight = ptx::exp2((score - row.lse) * kLog2E);
  float gradient = weight * (product - row.delta);
  if (member && row.weight != 0) {
    const float below = score - row.member_lse, share = ptx::exp2(below * kLog2E);
    const float log_average = map ? logarithm : share == 0 ? 0.0f : below;
    gradient -= row.weight * share * (log_average - row.cross);
  }
  score = weight, product = gradient;
}

// A block's tile of (query, key) pairs: 64 rows of one, kColumns of the other, in shared memory.
template <typename T, int width, bool transposed>
struct Tile {
  static constexpr int kColumns = streamed(width, sizeof(T)), kFragments = kColumns / 8;
  static constexpr int kStride = kSharedStride<T, width>;
  using Product = WarpProduct<T, width, kFragments>;
  using Fragments = float[kFragments][4];

  const AttentionBackward& call;
  const Sample& sample;
  int key_end;
  T *queries, *grads, *keys, *values;

  __device__ Tile(const AttentionBackward& call, const Sample& sample, int key_end)
      : call(call), sample(sample), key_end(key_end) {
    auto* own = static_cast<T*>(shared_memory());
    T* other = own + 2 * kQueryRows * kStride;
    queries = transposed ? other : own;
    grads = queries + (transposed ? kColumns : kQueryRows) * kStride;
    keys = transposed ? own : other;
    values = keys + (transposed ? kQueryRows : kColumns) * kStride;
  }

  // Queries [first, ...) of `heads` heads from `head` on, packed.
  __device__ void load_queries(T* target, const Operand& from, int columns, int64_t first,
                               int64_t head, int64_t heads) const {
    load_rows<T, width, transposed ? kColumns : kQueryRows>(target, from, columns, [&](int r) {
      const int64_t at = first + r;
      return at < heads * call.query_length
                 ? sample.b * from.batch + (head + at % heads) * from.head + at / heads * from.row
                 : int64_t{-1};
    });
  }

  __device__ void load_keys(T* target, const Operand& from, int columns, int first,
                            int64_t key_head) const {
    load_rows<T, width, transposed ? kQueryRows : kColumns>(target, from, columns, [&](int r) {
      return first + r < key_end ? sample.b * from.batch + key_head * from.head +
                                       static_cast<int64_t>(first + r) * from.row
                                 : int64_t{-1};
    });
  }

  // Whether a query from `query` on does not see some key before `key_stop`.
  __device__ bool is_partial(int64_t query, int key_stop) const {
    return call.mask.kind != MaskKind::none || call.ancestors != nullptr ||
           sample.bound(static_cast<int>(query)) < key_stop;
  }

  // Keys or queries that are NaN or infinite, which would multiply gradients of 0 beside hidden
  // scores, become 0: where their score is visible its gradient is NaN already.
  template <int rows>
  static __device__ void forget_non_finite(T* operand) {
    __syncthreads();  // nobody reads it any more
    for (int at = threadIdx.x; at < rows * width; at += kAttentionThreads) {
      T& value = operand[at / width * kStride + at % width];
      if (!(widen(value) * 0.0f == 0.0f)) value = narrow<T>(0.0f);
    }
    __syncthreads();
  }

  static __device__ void arrive() {
    ptx::commit_copies();
    ptx::wait_copies<0>();
    __syncthreads();
  }

  // Of the warp's 16 rows with all columns.
  __device__ void multiply(const T* of_queries, const T* of_keys, Fragments& sum) const {
    const int first = threadIdx.x / kWarp * 16 * kStride;
    Product::scores((transposed ? of_keys : of_queries) + first, transposed ? of_queries : of_keys,
                    sum);
  }

  // Logarithm of the head-averaged map of queries [query, ...) and keys [key, ...); uses the shared
  // memory of queries and keys. row_at(r, n, c) and key_at(r, n, c) say what a value belongs to.
  template <typename QueryAt, typename KeyAt>
  __device__ void average_logarithm(int64_t query, int key, Fragments& logarithm,
                                    QueryAt&& query_at, KeyAt&& key_at) const {
    const int64_t group = call.query_heads / call.key_heads;
    for (int64_t head = 0; head < call.query_heads; ++head) {
      __syncthreads();
      load_queries(queries, call.query, call.width, query, head, 1);
      load_keys(keys, call.key, call.width, key, head / group);
      arrive();
      Fragments scores = {};
      multiply(queries, keys, scores);
      each(scores, [&](int r, int n, int c, float& product) {
        const int own = static_cast<int>(query_at(r, n, c)), j = key_at(r, n, c);
        const bool there = own < call.query_length;
        const float score =
            sample.score(sample.row(own, static_cast<int>(head), there), j, product);
        if (score == -INFINITY || j < call.entropy_from) return;
        const int64_t index = (sample.b * call.query_heads + head) * call.query_length + own;
        logarithm[n][2 * r + c] += ptx::exp2((score - call.entropy_lse[index]) * kLog2E);
      });
    }
    const float share = 1.0f / static_cast<float>(call.query_heads);
    each(logarithm,
         [&](int, int, int, float& value) { value = value == 0 ? 0.0f : logf(value * share); });
  }

  // visit(n, c): column 8 n + 2 t + c.
  template <typename Visit>
  static __device__ __forceinline__ void each_column(Visit&& visit) {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) visit(n, c);
    }
  }

  // visit(r, n, c, value): also row g + 8 r of the warp.
  template <typename Visit>
  static __device__ __forceinline__ void each(Fragments& values, Visit&& visit) {
    each_column([&](int n, int c) {
#pragma unroll
      for (int r = 0; r < 2; ++r) visit(r, n, c, values[n][2 * r + c]);
    });
  }
};

// delta = <grad_out, out> - grad_lse; a warp takes a row.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, 2) delta_kernel(const AttentionBackward call) {
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (index >= call.batch * call.query_heads * call.query_length) return;
  const int64_t query = index % call.query_length, of_head = index / call.query_length;
  const Operand& from = call.grad_out;
  const T* grad = static_cast<const T*>(from.data) + of_head / call.query_heads * from.batch +
                  of_head % call.query_heads * from.head + query * from.row;
  const T* out = static_cast<const T*>(call.out) + index * call.value_width;
  float sum = 0;
  for (int column = lane; column < call.value_width; column += kWarp) {
    sum += widen(grad[column * from.column]) * widen(out[column]);
  }
  sum = warp_sum(sum);
  if (lane == 0) call.delta[index] = sum - call.grad_lse[index];
}

// Writes a warp's rows, where row_at(r) is not negative, times `factor`.
template <typename T, int width, typename RowAt>
__device__ void store_rows(void* target, int columns, const float (&values)[width / 8][4],
                           float factor, RowAt&& row_at) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = row_at(r);
    if (row < 0) continue;
#pragma unroll
    for (int n = 0; n < width / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * t + c;
        if (column >= columns) continue;
        static_cast<T*>(target)[row * columns + column] = narrow<T>(values[n][2 * r + c] * factor);
      }
    }
  }
}

// A block differentiates 64 queries of the heads that share a key head, or of one head for the
// entropy of the map. dQ = scale dS K
template <typename T, int width, bool map>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    query_gradient_kernel(const AttentionBackward call) {
  using GradientTile = Tile<T, width, false>;
  constexpr int kColumns = GradientTile::kColumns;
  const int64_t group = call.query_heads / call.key_heads, heads = map ? 1 : group;
  const int64_t packed = heads * call.query_length, blocks = blocks_of(packed, kQueryRows);
  const int64_t first = blockIdx.x % blocks * kQueryRows;
  const int64_t units = call.query_heads / heads, unit = blockIdx.x / blocks % units;
  const int64_t b = blockIdx.x / blocks / units, head = unit * heads, key_head = head / group;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const Sample sample(call, b);
  const int end = sample.key_end(static_cast<int>((min(first + kQueryRows, packed) - 1) / heads));
  const GradientTile tile(call, sample, end);

  Row rows[2];
  RowGradient gradients[2];
  for (int r = 0; r < 2; ++r) {
    const int64_t at = first + warp * 16 + g + 8 * r;
    rows[r] =
        sample.row(static_cast<int>(at / heads), static_cast<int>(head + at % heads), at < packed);
    gradients[r] = load_row(call, sample, rows[r]);
  }
  float sum[width / 8][4] = {};
  tile.load_queries(tile.grads, call.grad_out, call.value_width, first, head, heads);
  if (!map) tile.load_queries(tile.queries, call.query, call.width, first, head, heads);
  for (int start = 0; start < end; start += kColumns) {
    const auto key_at = [&](int, int n, int c) { return start + n * 8 + 2 * t + c; };
    typename GradientTile::Fragments logarithm = {};
    if constexpr (map) {
      tile.average_logarithm(
          first, start, logarithm, [&](int r, int, int) { return rows[r].query; }, key_at);
    }
    __syncthreads();  // nobody reads the last operands any more
    if (map) tile.load_queries(tile.queries, call.query, call.width, first, head, heads);
    tile.load_keys(tile.keys, call.key, call.width, start, key_head);
    tile.load_keys(tile.values, call.value, call.value_width, start, key_head);
    GradientTile::arrive();
    typename GradientTile::Fragments scores = {}, products = {};
    tile.multiply(tile.queries, tile.keys, scores);
    tile.multiply(tile.grads, tile.values, products);
    GradientTile::each(scores, [&](int r, int n, int c, float& score) {
      const int j = key_at(r, n, c);
      score = sample.score(rows[r], j, score);
      differentiate(gradients[r], j >= call.entropy_from, map, logarithm[n][2 * r + c], score,
                    products[n][2 * r + c]);
    });
    if (tile.is_partial(first / heads, start + kColumns)) {
      GradientTile::template forget_non_finite<kColumns>(tile.keys);
    }
    GradientTile::Product::outputs(products, tile.keys, sum);
  }
  ptx::commit_copies();
  ptx::wait_copies<0>();
  store_rows<T, width>(call.grad_query, call.width, sum, call.scale, [&](int r) {
    return rows[r].there ? (b * call.query_heads + rows[r].head) * call.query_length + rows[r].query
                         : int64_t{-1};
  });
}

// A block differentiates 64 keys, values or both: dK = scale dS^T Q, dV = p^T dO.
template <typename T, int width, bool map, bool for_keys, bool for_values>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    key_gradient_kernel(const AttentionBackward call) {
  using GradientTile = Tile<T, width, true>;
  constexpr int kColumns = GradientTile::kColumns;
  const int64_t group = call.query_heads / call.key_heads, heads = map ? 1 : group;
  const int64_t packed = heads * call.query_length;
  const int64_t blocks = blocks_of(call.key_length, kQueryRows);
  const int first = static_cast<int>(blockIdx.x % blocks) * kQueryRows;
  const int64_t key_head = blockIdx.x / blocks % call.key_heads;
  const int64_t b = blockIdx.x / blocks / call.key_heads;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const Sample sample(call, b);
  const int end = sample.key_end(call.query_length - 1);
  const GradientTile tile(call, sample, end);
  const auto key_at = [&](int r, int, int) { return first + warp * 16 + g + 8 * r; };

  float key_sum[for_keys ? width / 8 : 1][4] = {}, value_sum[for_values ? width / 8 : 1][4] = {};
  if (!map) tile.load_keys(tile.keys, call.key, call.width, first, key_head);
  tile.load_keys(tile.values, call.value, call.value_width, first, key_head);
  // The first query that sees the block's first key, if causal.
  const int64_t skipped = call.is_causal ? max(0, first - sample.offset) * heads : 0;
  const int64_t from = skipped / kColumns * kColumns;
  for (int64_t head = key_head * group; head < (key_head + 1) * group && first < end;
       head += heads) {
    for (int64_t start = from; start < packed; start += kColumns) {
      const auto query_at = [&](int, int n, int c) { return start + n * 8 + 2 * t + c; };
      typename GradientTile::Fragments logarithm = {};
      if constexpr (map) tile.average_logarithm(start, first, logarithm, query_at, key_at);
      __syncthreads();  // nobody reads the last operands any more
      if (map) tile.load_keys(tile.keys, call.key, call.width, first, key_head);
      tile.load_queries(tile.queries, call.query, call.width, start, head, heads);
      tile.load_queries(tile.grads, call.grad_out, call.value_width, start, head, heads);
      GradientTile::arrive();
      typename GradientTile::Fragments scores = {}, products = {};
      tile.multiply(tile.queries, tile.keys, scores);
      tile.multiply(tile.grads, tile.values, products);
      GradientTile::each_column([&](int n, int c) {
        const int64_t at = query_at(0, n, c);
        const Row row = sample.row(static_cast<int>(at / heads),
                                   static_cast<int>(head + at % heads), at < packed);
        const RowGradient gradient = load_row(call, sample, row);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int j = key_at(r, n, c);
          float& score = scores[n][2 * r + c];
          score = sample.score(row, j, score);
          differentiate(gradient, j >= call.entropy_from, map, logarithm[n][2 * r + c], score,
                        products[n][2 * r + c]);
        }
      });
      if constexpr (for_values) GradientTile::Product::outputs(scores, tile.grads, value_sum);
      if constexpr (for_keys) {
        if (tile.is_partial(start / heads, first + kQueryRows)) {
          GradientTile::template forget_non_finite<kColumns>(tile.queries);
        }
        GradientTile::Product::outputs(products, tile.queries, key_sum);
      }
    }
  }
  ptx::commit_copies();
  ptx::wait_copies<0>();
  const auto row_at = [&](int r) {
    const int64_t j = key_at(r, 0, 0);
    return j < call.key_length ? (b * call.key_heads + key_head) * call.key_length + j
                               : int64_t{-1};
  };
  if constexpr (for_keys) {
    store_rows<T, width>(call.grad_key, call.width, key_sum, call.scale, row_at);
  }
  if constexpr (for_values) {
    store_rows<T, width>(call.grad_value, call.value_width, value_sum, 1.0f, row_at);
  }
}

template <typename T, int width, bool map>
cudaError_t launch_sides(const AttentionBackward& call, cudaStream_t stream) {
  constexpr size_t kShared = kGradientShared<T, width>;
  const int64_t heads = map ? 1 : call.query_heads / call.key_heads;
  const int64_t query_tiles =
      call.batch * (call.query_heads / heads) * blocks_of(heads * call.query_length, kQueryRows);
  const LaunchShape keys{call.batch * call.key_heads * blocks_of(call.key_length, kQueryRows),
                         kAttentionThreads, kShared};
  cudaError_t error = launch(query_gradient_kernel<T, width, map>,
                             {query_tiles, kAttentionThreads, kShared}, stream, call);
  if (error != cudaSuccess) return error;
  if constexpr (sizeof(T) == 2 && width <= (map ? 64 : 128)) {
    return launch(key_gradient_kernel<T, width, map, true, true>, keys, stream, call);
  } else {  // the sums of both do not fit into registers
    error = launch(key_gradient_kernel<T, width, map, true, false>, keys, stream, call);
    if (error != cudaSuccess) return error;
    return launch(key_gradient_kernel<T, width, map, false, true>, keys, stream, call);
  }
}

}  // namespace

cudaError_t launch_attention_backward(const AttentionBackward& call, cudaStream_t stream) {
  const int64_t rows = call.batch * call.query_heads * call.query_length;
  return dispatch(call.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const cudaError_t error =
        launch(delta_kernel<T>, {blocks_of(rows, kAttentionThreads / kWarp), kAttentionThreads},
               stream, call);
    if (error != cudaSuccess) return error;
    return dispatch_width<T>(max(call.width, call.value_width), [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      return call.entropy == EntropyKind::map ? launch_sides<T, kWidth, true>(call, stream)
                                              : launch_sides<T, kWidth, false>(call, stream);
    });
  });
}

}  // namespace driftar::cuda
