#pragma once

// Few queries with keys as they lie: their scores have a row each, since lanes of a vector would
// stay idle. Only for kernel files.

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

// queries[i, 4 m + k] in the four lanes of 128 bits m, for every vector of columns and every k < 4:
// the factor of a transposed quad of keys. [width / lanes, 4, rows, lanes]
template <typename E, typename Scale>
void spread_queries(Rows<E> queries, int64_t rows, int64_t width, Scale&& scaled, E* spread) {
  constexpr int64_t lanes = Vector<float>::size();
  for (int64_t first = 0; first < width; first += lanes) {
    for (int64_t k = 0; k < 4; ++k) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          *spread++ = scaled(queries.at(i)[first + lane / 4 * 4 + k]);
        }
      }
    }
  }
}

// scores[i, j] = factor <query i, key j> for `columns` keys, up to the next whole vector (with the
// last key's scores); width in whole vectors.
template <int64_t ROWS, typename E>
void quad_scores(int64_t columns, int64_t width, float factor, const E* spread, Rows<E> keys,
                 float* scores, int64_t stride) {
  using V = Vector<float>;
  using Element = Elements<E>;
  constexpr int64_t lanes = V::size();
  constexpr int64_t quads = lanes >= 16 ? 2 : 1;  // that share the loads of the queries
  for (int64_t j = 0; j < columns; j += 4 * quads) {
    const E* key[4 * quads];
    for (int64_t r = 0; r < 4 * quads; ++r) key[r] = keys.at(std::min(j + r, columns - 1));
    V sums[ROWS][quads];
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
      for (int64_t q = 0; q < quads; ++q) sums[i][q] = V(0.0f);
    }
    const E* query = spread;
    for (int64_t first = 0; first < width; first += lanes) {
      V columns_of[quads][4];
#pragma GCC unroll 2
      for (int64_t q = 0; q < quads; ++q) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < 4; ++r) columns_of[q][r] = Element::load(key[4 * q + r] + first);
        transpose_quads(columns_of[q]);
      }
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < ROWS; ++i, query += lanes) {
          const V part = Element::load(query);
#pragma GCC unroll 2
          for (int64_t q = 0; q < quads; ++q) {
            sums[i][q] = Element::multiply_add(part, columns_of[q][k], sums[i][q]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
      for (int64_t q = 0; q < quads; ++q) {
        if constexpr (kPaired<E>) sums[i][q] = sums[i][q] * V(factor);
        store_quad_sums(sums[i][q], scores + i * stride + j + 4 * q);
      }
    }
  }
}

// The same for one or two queries, where transposing the sums costs less than transposing keys.
template <int64_t ROWS, typename E>
void dot_scores(int64_t columns, int64_t width, float factor, Rows<E> queries, Rows<E> keys,
                float* scores, int64_t stride) {
  using V = Vector<float>;
  using Element = Elements<E>;
  for (int64_t j = 0; j < columns; j += 4) {
    const E* key[4];
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
        const V query = Element::load(queries.at(i) + first);
#pragma GCC unroll 4
        for (int64_t r = 0; r < 4; ++r) {
          sums[i][r] = Element::multiply_add(query, Element::load(key[r] + first), sums[i][r]);
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
template <typename E>
constexpr int64_t kFewRows =
    kHasQuads && std::is_same_v<sum_t<E>, float> ? kGemmRows<float> : kDotRows;

// Keys multiplied at once.
constexpr int64_t kFewColumns = 8;

// scores[i, j] = factor <query i, key j> for kFewRows queries at most; behind the last key, up to
// the next whole vector, they are unspecified.
template <typename E>
class FewQueries {
 public:
  using T = sum_t<E>;

  FewQueries() = default;
  // `memory` holds 4 rows * width elements, width in whole vectors.
  FewQueries(Rows<E> queries, int64_t rows, int64_t width, T factor, E* memory)
      : queries_(queries), rows_(rows), width_(width), factor_(factor), spread_(memory) {
    if constexpr (quads) {
      const auto scaled = [factor](E x) {
        if constexpr (kPaired<E>) {
          return x;  // as it is; the scores are scaled
        } else {
          return factor * x;
        }
      };
      if (rows > kDotRows) spread_queries(queries, rows, width, scaled, memory);
    }
  }

  void multiply(int64_t columns, Rows<E> keys, T* scores, int64_t stride) const {
    if constexpr (quads) {
      multiply_rows<kFewRows<E>>(columns, keys, scores, stride);
    } else {
      for (int64_t i = 0; i < rows_; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          scores[i * stride + j] = factor_ * row_dot(queries_.at(i), keys.at(j), width_);
        }
      }
    }
  }

 private:
  static constexpr bool quads = kFewRows<E> > kDotRows;

  template <int64_t ROWS>
  void multiply_rows(int64_t columns, Rows<E> keys, T* scores, int64_t stride) const {
    if constexpr (ROWS > 0) {
      if (rows_ < ROWS) {
        multiply_rows<ROWS - 1>(columns, keys, scores, stride);
      } else if constexpr (ROWS > kDotRows) {
        quad_scores<ROWS>(columns, width_, factor_, spread_, keys, scores, stride);
      } else {
        dot_scores<ROWS>(columns, width_, factor_, queries_, keys, scores, stride);
      }
    }
  }

  Rows<E> queries_{};
  int64_t rows_ = 0, width_ = 0;
  T factor_{};
  E* spread_ = nullptr;
};

}  // namespace
}  // namespace driftar::cpu
