// With p = exp(s - lse), delta_i = <grad_out_i, out_i> - grad_lse_i, and over the entropy set
// q = exp(s - entropy_lse), pi = q (head) or its head average (map), c_i = sum_j q log pi:
//
//   dS_ij = p_ij (<grad_out_i, v_j> - delta_i) - w_i q_ij (log pi_ij - c_i)
//   dQ = scale dS K,   dK = scale dS^T Q,   dV = p^T grad_out
//
// w_i is the gradient of the entropy times its norm (and 1 / heads for "map").

#include "attention_tile.h"

#include <vector>

namespace driftar::cpu {

namespace {

// probabilities = exp(scores - lse), possibly in place; gradient, which holds <grad_out, v>,
// becomes p (gradient - delta).
template <typename T>
void softmax_gradient(const T* scores, int64_t count, T lse, T delta, T* probabilities,
                      T* gradient) {
  if (lse == kHidden<T>) {
    std::fill(probabilities, probabilities + count, T(0));
    std::fill(gradient, gradient + count, T(0));
    return;
  }
  const Vector<T> offset(lse), mean(delta), hidden(kHidden<T>), zero(T(0));
  Vector<T> exponent(T(0));
  for (int64_t i = 0; i < count; i += Vector<T>::size()) {
    const Vector<T> p = exponential_at(scores + i, offset, exponent);
    const Vector<T> is_hidden = Vector<T>::loadu(scores + i) == hidden;
    const Vector<T> change = p * (Vector<T>::loadu(gradient + i) - mean);
    // Selected rather than multiplied: the value of a hidden key may be NaN.
    Vector<T>::blendv(change, zero, is_hidden).store(gradient + i);
    p.store(probabilities + i);
  }
}

// gradient -= weight q (log pi - cross); `logarithms` is log pi, or null where pi = q.
template <typename T>
void entropy_gradient(const T* scores, int64_t count, T lse, T cross, T weight, const T* logarithms,
                      T* gradient) {
  const Vector<T> offset(lse), center(cross), factor(weight);
  Vector<T> exponent(T(0));
  for (int64_t i = 0; i < count; i += Vector<T>::size()) {
    const Vector<T> q = exponential_at(scores + i, offset, exponent);
    const Vector<T> logarithm = logarithms == nullptr ? exponent : Vector<T>::loadu(logarithms + i);
    (Vector<T>::loadu(gradient + i) - factor * q * (logarithm - center)).store(gradient + i);
  }
}

// Turns the scores of one head's tile into probabilities and `gradient`, which holds <grad_out, v>,
// into dS. `statistic(values)` addresses the tile's rows; `logarithms` is the head-averaged tile or
// null.
template <typename scalar_t, typename acc_t, typename Statistic>
void score_gradient(const AttentionBackward<scalar_t>& call, const Tile& tile,
                    const Statistic& statistic, const acc_t* entropy_weight, acc_t* scores,
                    const acc_t* logarithms, acc_t* row_buffer, acc_t* gradient) {
  const acc_t share = logarithms == nullptr ? acc_t(1) : acc_t(1) / call.query_heads;
  for (int64_t r = 0; r < tile.rows; ++r) {
    acc_t* row = scores + r * tile.stride;
    acc_t* row_gradient = gradient + r * tile.stride;
    std::fill(row_gradient + tile.columns, row_gradient + tile.stride, acc_t(0));
    const acc_t weight = entropy_weight == nullptr ? acc_t(0) : entropy_weight[r] * share;
    const acc_t* counted = nullptr;
    if (weight != acc_t(0) && statistic(call.entropy_lse)[r] != kHidden<acc_t>) {
      counted = entropy_row(call, tile, row, row_buffer);
    }
    if (counted == row) {  // the scores are about to be overwritten
      std::copy(row, row + tile.stride, row_buffer);
      counted = row_buffer;
    }
    softmax_gradient(row, tile.stride, statistic(call.lse)[r], statistic(call.delta)[r], row,
                     row_gradient);
    if (counted != nullptr) {
      entropy_gradient(
          counted, tile.stride, statistic(call.entropy_lse)[r], statistic(call.entropy_cross)[r],
          weight, logarithms == nullptr ? nullptr : logarithms + r * tile.stride, row_gradient);
    }
  }
}

}  // namespace

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::backward(const AttentionBackward<scalar_t>& call, int64_t task,
                                              acc_t* memory) {
  const bool map = call.entropy == EntropyKind::map;
  const int64_t group = call.query_heads / call.key_heads;
  const int64_t units = map ? 1 : call.key_heads;
  const int64_t split = task / (call.batch * units);
  const int64_t b = task / units % call.batch;
  const int64_t first_head = map ? 0 : task % units * group;
  const int64_t last_head = map ? call.query_heads : first_head + group;
  // Heads whose tiles are needed together: all of them for the head-averaged map.
  const int64_t together = map ? call.query_heads : 1;
  const int64_t row_block = map ? kMapQueryBlock : kQueryBlock;
  const int64_t column_block = map ? kMapKeyBlock : kKeyBlock;
  const int64_t tile_size = row_block * column_block;
  const int64_t query_size = row_block * call.width;
  const int64_t out_size = row_block * call.value_width;

  Scratch<acc_t> scratch{memory};
  acc_t* query_buffer = scratch.take(together * query_size);
  acc_t* grad_query = scratch.take(together * query_size);
  acc_t* grad_out_buffer = scratch.take(together * out_size);
  acc_t* key_buffer = scratch.take(column_block * call.width);
  acc_t* value_buffer = scratch.take(column_block * call.value_width);
  acc_t* scores = scratch.take(together * tile_size);
  acc_t* gradient = scratch.take(tile_size);
  acc_t* average = scratch.take(tile_size);
  acc_t* row_buffer = scratch.take(column_block);
  std::vector<Rows<acc_t>> queries(together), grad_out(together);

  const auto load_keys = [&](int64_t h, const Tile& tile) {
    return load_rows(call.key, b, h / group, tile.column, tile.columns, call.width, acc_t(1),
                     key_buffer);
  };

  const auto rows_of_block = [&](int64_t head, int64_t row, int64_t rows) {
    const auto row_of = [&](int64_t h) {
      return (b * call.query_heads + h) * call.query_length + row;
    };
    for (int64_t k = 0; k < together; ++k) {
      queries[k] = load_rows(call.query, b, head + k, row, rows, call.width, call.scale,
                             query_buffer + k * query_size);
      grad_out[k] = load_rows(call.grad_out, b, head + k, row, rows, call.value_width, acc_t(1),
                              grad_out_buffer + k * out_size);
    }
    std::fill(grad_query, grad_query + together * query_size, acc_t(0));

    for_each_tile(call, b, row, rows, column_block, [&](const Tile& tile) {
      std::fill(average, average + rows * tile.stride, acc_t(0));
      for (int64_t k = 0; k < together; ++k) {
        const int64_t h = head + k;
        score_tile(call, b, h, tile, queries[k], load_keys(h, tile), scores + k * tile_size);
        if (map) {
          add_probabilities(call, tile, call.entropy_lse + row_of(h), scores + k * tile_size,
                            row_buffer, average);
        }
      }
      if (map) row_logarithm(average, rows * tile.stride);

      for (int64_t k = 0; k < together; ++k) {
        const int64_t h = head + k;
        const int64_t key_head = h / group;
        acc_t* head_scores = scores + k * tile_size;
        const Rows<acc_t> keys = load_keys(h, tile);
        const Rows<acc_t> values = load_rows(call.value, b, key_head, tile.column, tile.columns,
                                             call.value_width, acc_t(1), value_buffer);
        gemm<acc_t>(Layout::normal, Layout::transposed, rows, tile.columns, call.value_width,
                    acc_t(1), grad_out[k].data, grad_out[k].stride, values.data, values.stride,
                    acc_t(0), gradient, tile.stride);
        const auto statistic = [&](const acc_t* values) { return values + row_of(h); };
        const acc_t* weight = call.entropy == EntropyKind::none ? nullptr
                              : map ? call.entropy_weight + b * call.query_length + row
                                    : call.entropy_weight + row_of(h);
        score_gradient(call, tile, statistic, weight, head_scores, map ? average : nullptr,
                       row_buffer, gradient);

        const int64_t slice = (split * call.batch + b) * call.key_heads + key_head;
        const int64_t key_row = slice * call.key_length + tile.column;
        accumulate(tile, Layout::normal, rows, call.width, tile.columns, call.scale, gradient, keys,
                   grad_query + k * query_size, call.width);
        // The queries already carry the scale.
        accumulate(tile, Layout::transposed, tile.columns, call.width, rows, acc_t(1), gradient,
                   queries[k], call.grad_key + key_row * call.width, call.width);
        accumulate(tile, Layout::transposed, tile.columns, call.value_width, rows, acc_t(1),
                   head_scores, grad_out[k], call.grad_value + key_row * call.value_width,
                   call.value_width);
      }
    });

    for (int64_t k = 0; k < together; ++k) {
      const acc_t* source = grad_query + k * query_size;
      scalar_t* target = call.grad_query + row_of(head + k) * call.width;
      for (int64_t i = 0; i < rows * call.width; ++i) target[i] = static_cast<scalar_t>(source[i]);
    }
  };

  for (int64_t head = first_head; head < last_head; head += together) {
    for (int64_t block = split; block < blocks(call.query_length, row_block);
         block += call.splits) {
      const int64_t row = block * row_block;
      rows_of_block(head, row, std::min(row_block, call.query_length - row));
    }
  }
}

template struct AttentionKernel<Isa::DRIFTAR_ISA, float>;
template struct AttentionKernel<Isa::DRIFTAR_ISA, double>;
template struct AttentionKernel<Isa::DRIFTAR_ISA, c10::BFloat16>;
template struct AttentionKernel<Isa::DRIFTAR_ISA, c10::Half>;

}  // namespace driftar::cpu
