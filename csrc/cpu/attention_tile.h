#pragma once

// Tiles of the score matrix: loading operands, and hiding what a query must not see. Only for
// kernel files.

#include "attention.h"
#include "gemm.h"
#include "rows.h"
#include "upcoming.h"
#include "vector.h"

#include "../common/online_softmax.h"
#include "../common/tree_layout.h"

#include <algorithm>
#include <limits>
#include <type_traits>

namespace driftar::cpu {
namespace {

template <typename T>
constexpr T kHidden = -std::numeric_limits<T>::infinity();

// Hands out consecutive pieces of a thread's scratch, each of whole cache lines.
template <typename T>
struct Scratch {
  T* next;
  T* take(int64_t count) {
    T* piece = next;
    next += padded<T>(count);
    return piece;
  }
  template <typename U>
  U* take_as(int64_t count) {
    return reinterpret_cast<U*>(take(blocks(count * sizeof(U), sizeof(T))));
  }
};

// Rows between one that is copied and one that is asked for meanwhile.
constexpr int64_t kRowsAhead = 16;

// `count` rows of one head from `first` on into `buffer`, whose rows are padded with zeros.
template <typename scalar_t, typename acc_t>
Rows<acc_t> copy_rows(const Operand<const scalar_t>& x, int64_t b, int64_t h, int64_t first,
                      int64_t count, int64_t width, acc_t* buffer) {
  const scalar_t* source = x.at(b, h, first);
  const int64_t stride = padded<acc_t>(width);
  for (int64_t r = 0; r < count; ++r) {
    const scalar_t* row = source + r * x.row;
    acc_t* target = buffer + r * stride;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (x.column == 1) {
        prefetch(Rows<scalar_t>{row + kRowsAhead * x.row, 0}, 1, width);
        copy_row(row, width, target);
        continue;
      }
    }
    if (x.column == 1) {
      for (int64_t c = 0; c < width; ++c) target[c] = static_cast<acc_t>(row[c]);
    } else if (x.column == 0) {  // expanded, as the gradient of a sum is
      std::fill(target, target + width, static_cast<acc_t>(row[0]));
    } else {
      for (int64_t c = 0; c < width; ++c) target[c] = static_cast<acc_t>(row[c * x.column]);
    }
    std::fill(target + width, target + stride, acc_t(0));
  }
  return {buffer, stride};
}

// The same, but in place where whole vectors can be read, and 16-bit numbers as pairs.
template <typename scalar_t, typename acc_t>
Rows<acc_t> load_rows(const Operand<const scalar_t>& x, int64_t b, int64_t h, int64_t first,
                      int64_t count, int64_t width, acc_t* buffer) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    const bool paired = sizeof(acc_t) > 2 || x.row % 2 == 0;
    if (x.column == 1 && width % Vector<acc_t>::size() == 0 && paired) {
      return {x.at(b, h, first), x.row};
    }
  }
  return copy_rows(x, b, h, first, count, width, buffer);
}

// `rows` consecutive queries of each of `heads` neighbouring heads that share a key head, numbered
// head by head.
template <typename scalar_t>
struct QueryBlock {
  const AttentionShape<scalar_t>& shape;
  int64_t b, head, heads, row, rows;

  int64_t count() const { return heads * rows; }
  int64_t key_head() const { return head / (shape.query_heads / shape.key_heads); }
  int64_t head_of(int64_t r) const { return heads == 1 ? head : head + r / rows; }
  int64_t query_of(int64_t r) const { return row + (heads == 1 ? r : r % rows); }
  // The block's rows of query or of the gradient of out.
  template <typename T>
  Rows<T> load(const Operand<const scalar_t>& x, int64_t width, T* buffer) const {
    if (heads == 1 || x.head == rows * x.row) {
      return load_rows(x, b, head, row, count(), width, buffer);
    }
    Rows<T> result{};
    for (int64_t h = heads - 1; h >= 0; --h) {
      result = copy_rows(x, b, head + h, row, rows, width, buffer + h * rows * padded<T>(width));
    }
    return result;
  }
  // Position of row r in the statistics [B, Hq, Lq].
  int64_t index(int64_t r) const {
    return (b * shape.query_heads + head_of(r)) * shape.query_length + query_of(r);
  }
};

// Consecutive keys, and the queries that meet them.
struct Tile {
  int64_t column, columns;
};

// Rows of one head will be needed, unless their elements lie apart.
template <typename scalar_t>
void expect(const Operand<const scalar_t>& x, int64_t b, int64_t h, int64_t first, int64_t count,
            int64_t width, Upcoming& upcoming) {
  if (x.column == 1) upcoming.add(Rows<scalar_t>{x.at(b, h, first), x.row}, count, width);
}

// Of keys and values.
template <typename scalar_t>
void expect_keys(const AttentionShape<scalar_t>& shape, int64_t b, int64_t key_head,
                 const Tile& tile, Upcoming& upcoming) {
  expect(shape.key, b, key_head, tile.column, tile.columns, shape.width, upcoming);
  expect(shape.value, b, key_head, tile.column, tile.columns, shape.value_width, upcoming);
}

// Neighbouring rows of a block, which the matrix products take together.
struct Strip {
  int64_t first, rows;
  int64_t columns;  // of the tile, seen by some row
  int64_t shared;   // the first of them, seen by every row unless there is a mask
  bool partial;     // whether some row does not see some of them

  // The part from `key` on, `count` keys.
  Strip part(int64_t key, int64_t count, bool masked) const {
    const int64_t seen = std::clamp<int64_t>(shared - key, 0, count);
    return {first, rows, count, seen, masked || seen < count};
  }
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

// The keys that a block meets, in tiles of `key_block`: first those that count for the entropy, all
// of them where it is not asked for. The statistics of E are then those of all keys so far.
struct KeyOrder {
  int64_t from, end;  // keys that count
  int64_t key_block;

  template <typename scalar_t>
  KeyOrder(const QueryBlock<scalar_t>& block, int64_t keys)
      : end(visible_end(block.shape, block.b, block.row + block.rows - 1)), key_block(keys) {
    from = block.shape.entropy == EntropyKind::none ? 0 : std::min(block.shape.entropy_from, end);
  }

  bool counts(const Tile& tile) const { return tile.columns > 0 && tile.column >= from; }
  Tile first() const {
    return from < end ? Tile{from, std::min(key_block, end - from)} : others(0);
  }
  // Without keys behind the last one.
  Tile after(const Tile& tile) const {
    const int64_t column = tile.column + tile.columns;
    if (tile.column < from) return others(column);
    return column < end ? Tile{column, std::min(key_block, end - column)} : others(0);
  }

 private:
  Tile others(int64_t column) const { return {column, std::min(key_block, from - column)}; }
};

template <typename scalar_t>
const uint64_t* ancestor_row(const AttentionShape<scalar_t>& shape, int64_t b, int64_t i) {
  const Visibility& v = shape.visibility;
  const int64_t nodes = shape.query_length;
  return v.ancestors + (b * v.ancestors_batch * nodes + i) * ancestor_words(nodes);
}

// Calls body(strip) for the strips of `most_rows` rows of a block that see some key of the tile.
template <typename scalar_t, typename Body>
void for_each_strip(const QueryBlock<scalar_t>& block, const Tile& tile, int64_t most_rows,
                    Body&& body) {
  const Visibility& v = block.shape.visibility;
  for (int64_t first = 0; first < block.count(); first += most_rows) {
    const int64_t rows = std::min(most_rows, block.count() - first);
    int64_t most = 0, least = tile.columns;
    for (int64_t r = first; r < first + rows; ++r) {
      const int64_t end = visible_end(block.shape, block.b, block.query_of(r)) - tile.column;
      most = std::max(most, std::min(end, tile.columns));
      least = std::min(least, end);
    }
    if (v.ancestors != nullptr) least = v.key_length[block.b] - tile.column;
    if (most <= 0) continue;
    const int64_t shared = std::clamp<int64_t>(least, 0, most);
    body(Strip{first, rows, most, shared, v.mask != nullptr || shared < most});
  }
}

// Whether some row of the block does not see some key of the tile that another row sees.
template <typename scalar_t>
bool is_partial(const QueryBlock<scalar_t>& block, const Tile& tile) {
  const Visibility& v = block.shape.visibility;
  const int64_t seen_by_all =
      v.ancestors != nullptr ? v.key_length[block.b] : visible_end(block.shape, block.b, block.row);
  return v.mask != nullptr || tile.column + tile.columns > seen_by_all;
}

template <typename acc_t>
void apply_mask(const Visibility& v, int64_t b, int64_t h, int64_t i, int64_t column,
                int64_t columns, acc_t* scores) {
  const int64_t start =
      b * v.mask_batch + h * v.mask_head + i * v.mask_row + column * v.mask_column;
  const auto apply = [&](int64_t step) {
    if (v.mask_is_bool) {
      const uint8_t* mask = static_cast<const uint8_t*>(v.mask) + start;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        scores[c] = mask[c * step] != 0 ? scores[c] : kHidden<acc_t>;
      }
      return;
    }
    const acc_t* mask = static_cast<const acc_t*>(v.mask) + start;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      const acc_t bias = mask[c * step];
      // Selected rather than added, so that NaN stays hidden.
      scores[c] = bias == kHidden<acc_t> ? bias : scores[c] + bias;
    }
  };
  v.mask_column == 1 ? apply(1) : apply(v.mask_column);  // the first one in vectors
}

// The scores of a strip, up to the next whole vector; `keys` are packed and carry the scale, unless
// they are pairs.
template <typename scalar_t, typename E, typename acc_t = accumulate_t<scalar_t>,
          typename Between = DoNothing>
void score_products(const QueryBlock<scalar_t>& block, const Strip& strip, Rows<E> queries,
                    Panels<E> keys, acc_t* scores, int64_t stride, const Between& between = {}) {
  multiply(strip.rows, whole_vectors<acc_t>(strip.columns), elements<E>(block.shape.width),
           kPaired<E> ? block.shape.scale : acc_t(1),
           Strided<E>{queries.at(strip.first), queries.stride, 1}, keys, acc_t(0), scores, stride,
           between);
}

// Scores become -inf where a key is hidden from its query and up to the next whole vector.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void hide_keys(const QueryBlock<scalar_t>& block, const Tile& tile, const Strip& strip,
               acc_t* scores, int64_t stride) {
  const AttentionShape<scalar_t>& shape = block.shape;
  const Visibility& v = shape.visibility;
  const int64_t whole = whole_vectors<acc_t>(strip.columns);
  for (int64_t r = 0; r < strip.rows; ++r) {
    acc_t* row = scores + r * stride;
    if (!strip.partial) {
      std::fill(row + strip.columns, row + whole, kHidden<acc_t>);
      continue;
    }
    const int64_t i = block.query_of(strip.first + r);
    const int64_t end =
        std::clamp<int64_t>(visible_end(shape, block.b, i) - tile.column, 0, strip.columns);
    std::fill(row + end, row + whole, kHidden<acc_t>);
    if (v.ancestors != nullptr) {
      const uint64_t* related = ancestor_row(shape, block.b, i);
      const int64_t prefix = v.key_length[block.b] - tile.column;
      for (int64_t c = std::max<int64_t>(prefix, 0); c < end; ++c) {
        if (!is_ancestor(related, c - prefix)) row[c] = kHidden<acc_t>;
      }
    }
    if (v.mask != nullptr) {
      apply_mask(v, block.b, block.head_of(strip.first + r), i, tile.column, end, row);
    }
  }
}

// What to subtract from the scores of a row of log-sum-exp `lse`, of which some may be hidden.
template <typename T>
T gradient_shift(T lse) {
  return lse == lse ? SoftmaxStatistics<T>::shift(lse) : T(0);
}

// probabilities = exp(score - entropy_lse) of one head over keys that count for the entropy, 0
// where hidden; average += probabilities / heads. Both are [rows, stride].
template <typename scalar_t, typename E, typename acc_t = accumulate_t<scalar_t>,
          typename Between = DoNothing>
void map_probabilities(const QueryBlock<scalar_t>& block, const Tile& tile,
                       const acc_t* entropy_lse, Rows<E> queries, Panels<E> keys, int64_t stride,
                       acc_t* probabilities, acc_t* average, const Between& between = {}) {
  const Vector<acc_t> share(acc_t(1) / static_cast<acc_t>(block.shape.query_heads));
  std::fill(probabilities, probabilities + block.rows * stride, acc_t(0));
  for_each_strip(block, tile, kGemmRows<acc_t>, [&](const Strip& strip) {
    score_products(block, strip, queries, keys, probabilities + strip.first * stride, stride,
                   between);
    hide_keys(block, tile, strip, probabilities + strip.first * stride, stride);
    for (int64_t r = strip.first; r < strip.first + strip.rows; ++r) {
      const Vector<acc_t> shift(gradient_shift(entropy_lse[r]));
      acc_t *row = probabilities + r * stride, *mean = average + r * stride;
      for (int64_t j = 0; j < strip.columns; j += Vector<acc_t>::size()) {
        const Vector<acc_t> q = exponential(Vector<acc_t>::loadu(row + j) - shift);
        q.store(row + j);
        at::vec::fmadd(q, share, Vector<acc_t>::loadu(mean + j)).store(mean + j);
      }
    }
  });
}

// Padded rows as contiguous ones of the caller's dtype.
template <typename acc_t, typename scalar_t>
void store_rows(const acc_t* rows, int64_t stride, int64_t count, int64_t width, scalar_t* target) {
  for (int64_t r = 0; r < count; ++r) {
    store_scaled(rows + r * stride, width, acc_t(1), target + r * width);
  }
}

}  // namespace
}  // namespace driftar::cpu
