// With p = exp(s - lse), delta_i = <grad_out_i, out_i> - grad_lse_i, and over the entropy set
// q = exp(s - entropy_lse), pi = q (head) or its head average (map), c_i = sum_j q log pi:
//
//   dS_ij = p_ij (<grad_out_i, v_j> - delta_i) - w_i q_ij (log pi_ij - c_i)
//   dQ = scale dS K,   dK = scale dS^T Q,   dV = p^T grad_out
//
// w_i is the gradient of the entropy times its norm (and 1 / heads for "map"). One exponential
// serves p and q: p = q exp(entropy_lse - lse), a factor of at most 1.

#include "attention_vector_gradient.h"
#if defined(__AMX_BF16__)
#include "attention_amx_gradient.h"
#endif

namespace driftar::cpu {

namespace {

// <a, b>, b in steps of `step`.
template <typename scalar_t>
inline accumulate_t<scalar_t> dot(const scalar_t* a, const scalar_t* b, int64_t step,
                                  int64_t count) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < count; ++c) {
    sum += static_cast<acc_t>(a[c]) * static_cast<acc_t>(b[c * step]);
  }
  return sum;
}

}  // namespace

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::row_deltas(const AttentionBackward<scalar_t>& call,
                                                int64_t task) {
  const int64_t b = task / call.query_heads, h = task % call.query_heads;
  for (int64_t i = 0; i < call.query_length; ++i) {
    const int64_t index = task * call.query_length + i;
    const scalar_t* out = call.out + index * call.value_width;
    const scalar_t* grad = call.grad_out.at(b, h, i);
    // Neighbours in memory in a loop of their own, which vectorises.
    call.delta[index] =
        (call.grad_out.column == 1 ? dot(out, grad, 1, call.value_width)
                                   : dot(out, grad, call.grad_out.column, call.value_width)) -
        call.grad_lse[index];
  }
}

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::backward(const AttentionBackward<scalar_t>& call, int64_t task,
                                              acc_t* grad_queries, acc_t* memory) {
#if defined(__AMX_BF16__)
  if (differentiates_tiles<isa>(call)) return backward_tiles(call, task, grad_queries, memory);
#endif
  return backward_vectors(call, task, grad_queries, memory);
}

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::store_queries(const AttentionBackward<scalar_t>& call,
                                                   int64_t b, int64_t head, int64_t heads,
                                                   acc_t* grad_queries, int64_t parts,
                                                   int64_t part_stride) {
  const bool tiles = differentiates_tiles<isa>(call);
  for (int64_t part = 1; part < parts; ++part) {
    const acc_t* other = grad_queries + part * part_stride;
    for (int64_t i = 0; i < gathered_size(call, heads, tiles); ++i) grad_queries[i] += other[i];
  }
  scalar_t* target =
      call.grad_query + (b * call.query_heads + head) * call.query_length * call.width;
#if defined(__AMX_BF16__)
  if (tiles) return store_transposed_queries(call, heads, grad_queries, target);
#endif
  store_rows(grad_queries, padded<acc_t>(call.width), heads * call.query_length, call.width,
             target);
}

}  // namespace driftar::cpu

#include "attention_instances.h"
