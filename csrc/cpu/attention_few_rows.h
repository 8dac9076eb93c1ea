#pragma once

// Few queries with keys as they lie: their scores have a row each, since lanes of a vector would stay
// idle. Only for kernel files.

#include "attention_tile.h"

#include <algorithm>
#include <cstdint>

namespace driftar::cpu {
namespace {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

// Four rows of a vector become four vectors: the four lanes of every 128 bits, which were four
// columns of a row, become the four rows of a column.
inline void transpose_quads(Vector<float> (&rows)[4]) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
  const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
  const __m512d other_low = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
  const __m512d other_high = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
  rows[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, other_low));
  rows[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, other_low));
  rows[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, other_high));
  rows[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, other_high));
#else
  const __m256d low = _mm256_castps_pd(_mm256_unpacklo_ps(rows[0], rows[1]));
  const __m256d high = _mm256_castps_pd(_mm256_unpackhi_ps(rows[0], rows[1]));
  const __m256d other_low = _mm256_castps_pd(_mm256_unpacklo_ps(rows[2], rows[3]));
  const __m256d other_high = _mm256_castps_pd(_mm256_unpackhi_ps(rows[2], rows[3]));
  rows[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, other_low));
  rows[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, other_low));
  rows[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high, other_high));
  rows[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high, other_high));
#endif
}

// target[k] = sum of the lanes k, 4 + k, 8 + k, ...
inline void store_quad_sums(Vector<float> sums, float* target) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
#else
  const __m256 half = sums;
#endif
  _mm_storeu_ps(target, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// factor queries[i, 4 m + k] in the four lanes of 128 bits m, for every vector of columns and every
// k < 4: the factor of a transposed quad of keys. [width / lanes, 4, rows, lanes]
inline void spread_queries(Rows<float> queries, int64_t rows, int64_t width, float factor,
                           float* spread) {
  constexpr int64_t lanes = Vector<float>::size();
  for (int64_t first = 0; first < width; first += lanes) {
    for (int64_t k = 0; k < 4; ++k) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          *spread++ = factor * queries.at(i)[first + lane / 4 * 4 + k];
        }
      }
    }
  }
}

// scores[i, j] = <query i, key j> for `columns` keys, up to the next whole vector (with the last
// key's scores); width in whole vectors.
template <int64_t ROWS>
void quad_scores(int64_t columns, int64_t width, const float* spread, Rows<float> keys,
                 float* scores, int64_t stride) {
  using V = Vector<float>;
  constexpr int64_t lanes = V::size();
  constexpr int64_t quads = lanes >= 16 ? 2 : 1;  // that share the loads of the queries
  for (int64_t j = 0; j < columns; j += 4 * quads) {
    const float* key[4 * quads];
    for (int64_t r = 0; r < 4 * quads; ++r) key[r] = keys.at(std::min(j + r, columns - 1));
    V sums[ROWS][quads];
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
      for (int64_t q = 0; q < quads; ++q) sums[i][q] = V(0.0f);
    }
    const float* query = spread;
    for (int64_t first = 0; first < width; first += lanes) {
      V columns_of[quads][4];
#pragma GCC unroll 2
      for (int64_t q = 0; q < quads; ++q) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < 4; ++r) columns_of[q][r] = V::loadu(key[4 * q + r] + first);
        transpose_quads(columns_of[q]);
      }
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < ROWS; ++i, query += lanes) {
          const V factor = V::loadu(query);
#pragma GCC unroll 2
          for (int64_t q = 0; q < quads; ++q) {
            sums[i][q] = at::vec::fmadd(factor, columns_of[q][k], sums[i][q]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
      for (int64_t q = 0; q < quads; ++q) {
        store_quad_sums(sums[i][q], scores + i * stride + j + 4 * q);
      }
    }
  }
}

// The same for one or two queries, where transposing the sums costs less than transposing keys.
template <int64_t ROWS>
void dot_scores(int64_t columns, int64_t width, float factor, Rows<float> queries, Rows<float> keys,
                float* scores, int64_t stride) {
  using V = Vector<float>;
  for (int64_t j = 0; j < columns; j += 4) {
    const float* key[4];
    for (int64_t r = 0; r < 4; ++r) key[r] = keys.at(std::min(j + r, columns - 1));
    V sums[ROWS][4];
#pragma GCC unroll 2
    for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
      for (int64_t r = 0; r < 4; ++r) sums[i][r] = V(0.0f);
    }
    for (int64_t first = 0; first < width; first += V::size()) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < ROWS; ++i) {
        const V query = V::loadu(queries.at(i) + first);
#pragma GCC unroll 4
        for (int64_t r = 0; r < 4; ++r) {
          sums[i][r] = at::vec::fmadd(query, V::loadu(key[r] + first), sums[i][r]);
        }
      }
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < ROWS; ++i) {
      transpose_quads(sums[i]);
      const V sum = (sums[i][0] + sums[i][1]) + (sums[i][2] + sums[i][3]);
      store_quad_sums(sum * V(factor), scores + i * stride + j);
    }
  }
}

constexpr bool kHasQuads = true;
#else
constexpr bool kHasQuads = false;
#endif

// Up to so many queries are multiplied with the keys as they lie: one strip at most.
template <typename T>
constexpr int64_t kFewRows = kHasQuads && std::is_same_v<T, float> ? kGemmRows<T> : kDotRows;

// Keys multiplied at once.
constexpr int64_t kFewColumns = 8;

// scores[i, j] = factor <query i, key j> for kFewRows queries at most; behind the last key, up to
// the next whole vector, they are unspecified.
template <typename T>
class FewQueries {
 public:
  FewQueries() = default;
  // `memory` holds 4 rows * width values, width in whole vectors.
  FewQueries(Rows<T> queries, int64_t rows, int64_t width, T factor, T* memory)
      : queries_(queries), rows_(rows), width_(width), factor_(factor), spread_(memory) {
    if constexpr (quads) {
      if (rows > kDotRows) spread_queries(queries, rows, width, factor, memory);
    }
  }

  void multiply(int64_t columns, Rows<T> keys, T* scores, int64_t stride) const {
    if constexpr (quads) {
      multiply_rows<kFewRows<T>>(columns, keys, scores, stride);
    } else {
      for (int64_t i = 0; i < rows_; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          scores[i * stride + j] = factor_ * row_dot(queries_.at(i), keys.at(j), width_);
        }
      }
    }
  }

 private:
  static constexpr bool quads = kFewRows<T> > kDotRows;

  template <int64_t ROWS>
  void multiply_rows(int64_t columns, Rows<T> keys, T* scores, int64_t stride) const {
    if constexpr (ROWS > 0) {
      if (rows_ < ROWS) {
        multiply_rows<ROWS - 1>(columns, keys, scores, stride);
      } else if constexpr (ROWS > kDotRows) {
        quad_scores<ROWS>(columns, width_, spread_, keys, scores, stride);
      } else {
        dot_scores<ROWS>(columns, width_, factor_, queries_, keys, scores, stride);
      }
    }
  }

  Rows<T> queries_{};
  int64_t rows_ = 0, width_ = 0;
  T factor_{};
  T* spread_ = nullptr;
};

// How a block of at most kFewRows queries, one strip, meets a tile of keys and values.
template <typename scalar_t>
struct FewProducts {
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int64_t strip_rows = kFewRows<acc_t>;
  // Rows of memory that the products write for `rows` rows of scores or of out.
  static constexpr int64_t written_rows(int64_t rows) { return rows; }

  const QueryBlock<scalar_t>& block;
  const AttentionShape<scalar_t>& shape;
  int64_t key_block, width, value_width;
  bool fetches;  // the fewest queries only wait for memory, which nobody needs to ask for
  acc_t *key_buffer, *value_buffer;
  FewQueries<acc_t> queries{};
  Rows<acc_t> keys{}, values{};
  bool guarded = false;

  FewProducts(const QueryBlock<scalar_t>& query_block, int64_t keys_per_tile,
              Scratch<acc_t>& scratch)
      : block(query_block),
        shape(query_block.shape),
        key_block(keys_per_tile),
        width(whole_vectors<acc_t>(shape.width)),
        value_width(whole_vectors<acc_t>(shape.value_width)),
        fetches(block.count() > kDotRows) {
    acc_t* query_buffer = scratch.take(block.count() * padded<acc_t>(shape.width));
    key_buffer = scratch.take(key_block * padded<acc_t>(shape.width));
    value_buffer = scratch.take(key_block * padded<acc_t>(shape.value_width));
    queries = {block.load(shape.query, shape.width, query_buffer), block.count(), width,
               shape.scale, scratch.take(4 * block.count() * padded<acc_t>(shape.width))};
  }

  void load(const Tile& tile) {
    keys = load_rows(shape.key, block.b, block.key_head(), tile.column, tile.columns, shape.width,
                     key_buffer);
    values = load_rows(shape.value, block.b, block.key_head(), tile.column, tile.columns,
                       shape.value_width, value_buffer);
    guarded = is_partial(block, tile) && !all_finite(values, tile.columns, value_width);
  }

  // scores = scale queries keys^T, rows key_block apart.
  void multiply_keys(const Strip& strip, acc_t* scores) const {
    const int64_t step = fetches ? kFewColumns : strip.columns;
    for (int64_t c = 0; c < strip.columns; c += step) {
      const int64_t count = std::min(step, strip.columns - c);
      if (fetches) {
        prefetch(values.from(c), count, value_width);
        prefetch(keys.from(c + key_block), count, width);
      }
      queries.multiply(count, keys.from(c), scores + c, key_block);
    }
  }

  // out += weights values
  void multiply_values(const Strip& strip, const acc_t* weights, acc_t* out,
                       int64_t out_stride) const {
    accumulate(strip.rows, value_width, strip.columns, {weights, key_block, 1}, values, guarded,
               out, out_stride);
  }
};

}  // namespace
}  // namespace driftar::cpu
