#pragma once

// Tiles of the score matrix: loading operands, and hiding what a query must not see. Only for
// kernel files.

#include "attention.h"
#include "gemm.h"
#include "vector.h"

#include "../common/online_softmax.h"
#include "../common/tree_layout.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace driftar::cpu {
namespace {

template <typename T>
constexpr T kHidden = -std::numeric_limits<T>::infinity();

// Hands out consecutive pieces of a thread's scratch.
template <typename T>
struct Scratch {
  T* next;
  T* take(int64_t count) {
    T* piece = next;
    next += count;
    return piece;
  }
};

template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
};

// Rows [first, first + count) of one head times `factor`: in place when that is possible, else in
// `buffer`.
template <typename scalar_t, typename acc_t>
Rows<acc_t> load_rows(const Operand<const scalar_t>& x, int64_t b, int64_t h, int64_t first,
                      int64_t count, int64_t width, acc_t factor, acc_t* buffer) {
  const scalar_t* source = x.at(b, h, first);
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    if (factor == acc_t(1) && x.column == 1 && x.row >= width) return {source, x.row};
  }
  for (int64_t r = 0; r < count; ++r) {
    const scalar_t* row = source + r * x.row;
    acc_t* target = buffer + r * width;
    if (x.column == 1) {
      for (int64_t c = 0; c < width; ++c) target[c] = factor * static_cast<acc_t>(row[c]);
    } else {
      for (int64_t c = 0; c < width; ++c)
        target[c] = factor * static_cast<acc_t>(row[c * x.column]);
    }
  }
  return {buffer, width};
}

struct Tile {
  int64_t row, rows, column, columns;
  int64_t stride;  // columns, padded
  bool partial;    // whether some query of the tile does not see some key of it
};

// One past the last key that query i may see; it never decreases with i.
template <typename scalar_t>
int64_t visible_end(const AttentionShape<scalar_t>& shape, int64_t b, int64_t i) {
  const Visibility& v = shape.visibility;
  const int64_t length = v.key_length[b];
  if (v.ancestors != nullptr) return length + i + 1;
  if (!v.is_causal) return length;
  return std::clamp<int64_t>(i + v.query_offset[b] + 1, 0, length);
}

template <typename scalar_t>
const uint64_t* ancestor_row(const AttentionShape<scalar_t>& shape, int64_t b, int64_t i) {
  const Visibility& v = shape.visibility;
  const int64_t nodes = shape.query_length;
  return v.ancestors + (b * v.ancestors_batch * nodes + i) * ancestor_words(nodes);
}

// Calls body(tile) for every tile of key columns that the queries [row, row + rows) can see.
template <typename scalar_t, typename Body>
void for_each_tile(const AttentionShape<scalar_t>& shape, int64_t b, int64_t row, int64_t rows,
                   int64_t key_block, Body&& body) {
  using acc_t = accumulate_t<scalar_t>;
  const Visibility& v = shape.visibility;
  const int64_t end = visible_end(shape, b, row + rows - 1);
  const int64_t seen_by_all = v.ancestors != nullptr ? v.key_length[b] : visible_end(shape, b, row);
  for (int64_t column = 0; column < end; column += key_block) {
    const int64_t columns = std::min(key_block, end - column);
    const bool partial = v.mask != nullptr || column + columns > seen_by_all;
    body(Tile{row, rows, column, columns, padded<acc_t>(columns), partial});
  }
}

template <typename acc_t>
void apply_mask(const Visibility& v, int64_t b, int64_t h, int64_t i, int64_t column,
                int64_t columns, acc_t* scores) {
  const int64_t start =
      b * v.mask_batch + h * v.mask_head + i * v.mask_row + column * v.mask_column;
  if (v.mask_is_bool) {
    const bool* mask = static_cast<const bool*>(v.mask) + start;
    for (int64_t c = 0; c < columns; ++c) {
      if (!mask[c * v.mask_column]) scores[c] = kHidden<acc_t>;
    }
    return;
  }
  const acc_t* mask = static_cast<const acc_t*>(v.mask) + start;
  for (int64_t c = 0; c < columns; ++c) {
    const acc_t bias = mask[c * v.mask_column];
    scores[c] =
        bias == kHidden<acc_t> ? bias : scores[c] + bias;  // selected, so that NaN stays hidden
  }
}

// scores = queries keys^T, -inf where a key is hidden from its query and in the padding.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void score_tile(const AttentionShape<scalar_t>& shape, int64_t b, int64_t h, const Tile& tile,
                Rows<acc_t> queries, Rows<acc_t> keys, acc_t* scores) {
  gemm<acc_t>(Layout::normal, Layout::transposed, tile.rows, tile.columns, shape.width, acc_t(1),
              queries.data, queries.stride, keys.data, keys.stride, acc_t(0), scores, tile.stride);
  const Visibility& v = shape.visibility;
  for (int64_t r = 0; r < tile.rows; ++r) {
    acc_t* row = scores + r * tile.stride;
    std::fill(row + tile.columns, row + tile.stride, kHidden<acc_t>);
    if (!tile.partial) continue;
    const int64_t i = tile.row + r;
    const int64_t end =
        std::clamp<int64_t>(visible_end(shape, b, i) - tile.column, 0, tile.columns);
    std::fill(row + end, row + tile.columns, kHidden<acc_t>);
    if (v.ancestors != nullptr) {
      const uint64_t* related = ancestor_row(shape, b, i);
      const int64_t prefix = v.key_length[b] - tile.column;
      for (int64_t c = std::max<int64_t>(prefix, 0); c < end; ++c) {
        if (!is_ancestor(related, c - prefix)) row[c] = kHidden<acc_t>;
      }
    }
    if (v.mask != nullptr) apply_mask(v, b, h, i, tile.column, end, row);
  }
}

// The scores of a row that count for the entropy: the row itself, a copy in `buffer` with the
// columns before entropy_from hidden, or null when none is left.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
const acc_t* entropy_row(const AttentionShape<scalar_t>& shape, const Tile& tile, const acc_t* row,
                         acc_t* buffer) {
  const int64_t skipped = shape.entropy_from - tile.column;
  if (skipped <= 0) return row;
  if (skipped >= tile.columns) return nullptr;
  std::fill(buffer, buffer + skipped, kHidden<acc_t>);
  std::copy(row + skipped, row + tile.stride, buffer + skipped);
  return buffer;
}

// average += p / heads, p the probabilities of one head renormalised over the entropy set.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void add_probabilities(const AttentionShape<scalar_t>& shape, const Tile& tile,
                       const acc_t* entropy_lse, const acc_t* scores, acc_t* buffer,
                       acc_t* average) {
  const acc_t share = acc_t(1) / static_cast<acc_t>(shape.query_heads);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const acc_t* row = entropy_row(shape, tile, scores + r * tile.stride, buffer);
    if (row == nullptr || entropy_lse[r] == kHidden<acc_t>) continue;
    row_add_exponentials(row, tile.stride, entropy_lse[r], share, average + r * tile.stride);
  }
}

template <typename T>
bool all_finite(Rows<T> rows, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < width; ++c) {
      if (!std::isfinite(rows.data[r * rows.stride + c])) return false;
    }
  }
  return true;
}

// target[m, n] += factor * op(coefficients) [m, k] rows [k, n]. Coefficients that are 0 because a
// key is hidden must not let NaN or inf of the row they belong to through.
template <typename T>
void accumulate(const Tile& tile, Layout layout, int64_t m, int64_t n, int64_t k, T factor,
                const T* coefficients, Rows<T> rows, T* target, int64_t target_stride) {
  if (!tile.partial || all_finite(rows, k, n)) {
    gemm<T>(layout, Layout::normal, m, n, k, factor, coefficients, tile.stride, rows.data,
            rows.stride, T(1), target, target_stride);
    return;
  }
  const bool transposed = layout == Layout::transposed;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const T coefficient =
          transposed ? coefficients[j * tile.stride + i] : coefficients[i * tile.stride + j];
      if (coefficient == T(0)) continue;
      for (int64_t c = 0; c < n; ++c) {
        target[i * target_stride + c] += factor * coefficient * rows.data[j * rows.stride + c];
      }
    }
  }
}

}  // namespace
}  // namespace driftar::cpu
