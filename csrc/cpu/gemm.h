#pragma once

// Row-major matrix products for the block loops of the kernels, on ATen's vectors. BLAS is not used
// because the PyTorch libraries export no portable entry to it, and its threads would fight with
// ours. Only for files compiled per instruction set.

#include "vector.h"

#include <algorithm>
#include <cstdint>

namespace driftar::cpu {
namespace {

// How elements E of two matrices multiply, and what their products are summed in.
template <typename E>
struct Elements {
  static constexpr int64_t numbers = 1;  // neighbours in the depth that form an element
  using sum_t = E;
  using vector_t = Vector<E>;
  static vector_t load(const E* x) { return vector_t::loadu(x); }
  static vector_t spread(E x) { return vector_t(x); }
  static vector_t multiply_add(vector_t a, vector_t b, vector_t sum) {
    return at::vec::fmadd(a, b, sum);
  }
};
template <typename E>
using sum_t = typename Elements<E>::sum_t;
template <typename E>
constexpr bool kPaired = Elements<E>::numbers == 2;
// Elements that hold `count` numbers.
template <typename E>
constexpr int64_t elements(int64_t count) {
  return (count + Elements<E>::numbers - 1) / Elements<E>::numbers;
}

// Register block: kGemmRows x (2 vectors) accumulators, two vectors of B and one broadcast of A fit
// 32 (AVX-512) or 16 registers.
template <typename E>
constexpr int64_t kGemmColumns = 2 * Vector<sum_t<E>>::size();
template <typename T>
constexpr int64_t kGemmRows = sizeof(T) * Vector<T>::size() >= 64 ? 8 : 6;

// An operand of which element (i, p) is data[i * row + p * column].
template <typename T>
struct Strided {
  const T* data;
  int64_t row, column;

  Strided from(int64_t i, int64_t p) const { return {data + i * row + p * column, row, column}; }
};

// A right operand as panels of kGemmColumns columns: element (p, j) lies at
// data[j / kGemmColumns * panel + p * stride + j % kGemmColumns].
template <typename T>
struct Panels {
  const T* data;
  int64_t stride, panel;
};

template <typename T>
Panels<T> in_place(const T* rows, int64_t stride) {
  return {rows, stride, kGemmColumns<T>};
}

template <typename T>
Panels<T> packed_panels(const T* packed, int64_t depth) {
  return {packed, kGemmColumns<T>, kGemmColumns<T> * depth};
}

// c[ROWS, VECTORS vectors] = alpha a b + beta c
template <int64_t ROWS, int64_t VECTORS, typename E, typename T = sum_t<E>>
inline void gemm_block(int64_t depth, T alpha, Strided<E> a, const E* b, int64_t stride_b, T beta,
                       T* c, int64_t stride_c) {
  using Element = Elements<E>;
  using V = Vector<T>;
  V sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < VECTORS; ++j) sums[i][j] = V(T(0));
  }
  for (int64_t p = 0; p < depth; ++p) {
    typename Element::vector_t right[VECTORS];
#pragma GCC unroll 4
    for (int64_t j = 0; j < VECTORS; ++j) {
      right[j] = Element::load(b + p * stride_b + j * V::size());
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; ++i) {
      const auto factor = Element::spread(a.data[i * a.row + p * a.column]);
#pragma GCC unroll 4
      for (int64_t j = 0; j < VECTORS; ++j) {
        sums[i][j] = Element::multiply_add(factor, right[j], sums[i][j]);
      }
    }
  }
  const V scale(alpha), keep(beta);
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < VECTORS; ++j) {
      T* target = c + i * stride_c + j * V::size();
      V result = scale * sums[i][j];
      if (beta != T(0)) result = at::vec::fmadd(keep, V::loadu(target), result);
      result.store(target);
    }
  }
}

struct DoNothing {
  void operator()() const {}
};

// A strip of C, `columns` whole vectors wide, of a number of rows known at run time.
template <int64_t ROWS, typename E, typename Between, typename T = sum_t<E>>
void gemm_strip(int64_t rows, int64_t columns, int64_t depth, T alpha, Strided<E> a, Panels<E> b,
                T beta, T* c, int64_t stride_c, const Between& between) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) {
      gemm_strip<ROWS - 1>(rows, columns, depth, alpha, a, b, beta, c, stride_c, between);
      return;
    }
    constexpr int64_t width = kGemmColumns<E>;
    const E* panel = b.data;
    int64_t column = 0;
    if constexpr (ROWS <= kGemmRows<T> / 2) {  // so few rows leave registers for twice the columns
      for (; b.panel == width && column + 2 * width <= columns;
           column += 2 * width, panel += 2 * width) {
        between();
        gemm_block<ROWS, 4>(depth, alpha, a, panel, b.stride, beta, c + column, stride_c);
      }
    }
    // Three vectors at the end, where they fit the registers, rather than two and one.
    constexpr bool wide = 3 * ROWS + 4 <= (sizeof(T) * Vector<T>::size() >= 64 ? 32 : 16);
    const int64_t pairs =
        wide && b.panel == width && columns % width != 0 ? columns - width : columns;
    for (; column + width <= pairs; column += width, panel += b.panel) {
      between();
      gemm_block<ROWS, 2>(depth, alpha, a, panel, b.stride, beta, c + column, stride_c);
    }
    if constexpr (wide) {
      if (columns - column == width + Vector<T>::size()) {
        gemm_block<ROWS, 3>(depth, alpha, a, panel, b.stride, beta, c + column, stride_c);
        return;
      }
    }
    if (column < columns) {
      gemm_block<ROWS, 1>(depth, alpha, a, panel, b.stride, beta, c + column, stride_c);
    }
  }
}

// C[rows, columns] = alpha A B + beta C for whole vectors of columns. C is not read when beta is 0.
// Calls between() before every block of two vectors of columns.
template <typename E, typename T = sum_t<E>, typename Between = DoNothing>
void multiply(int64_t rows, int64_t columns, int64_t depth, T alpha, Strided<E> a, Panels<E> b,
              T beta, T* c, int64_t stride_c, const Between& between = {}) {
  constexpr int64_t height = kGemmRows<T>;
  for (int64_t row = 0; row < rows; row += height) {
    gemm_strip<height>(std::min(height, rows - row), columns, depth, alpha, a.from(row, 0), b, beta,
                       c + row * stride_c, stride_c, between);
  }
}

// target[p, j] = factor source[j, p] for a square of one vector's lanes.
template <typename T>
void transpose_square(const T* source, int64_t stride, T factor, T* target, int64_t target_stride) {
  for (int64_t p = 0; p < Vector<T>::size(); ++p) {
    for (int64_t j = 0; j < Vector<T>::size(); ++j) {
      target[p * target_stride + j] = factor * source[j * stride + p];
    }
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// Row p of the target is finish(column p of the source) for a square of 16 x 16 elements of 32
// bits, whose row r begins at row(r).
template <typename Row, typename Finish>
void transpose_16x16(Row&& row, Finish&& finish, float* target, int64_t target_stride) {
  // Quarter m of the rows goes to 128-bit lane m while it is loaded; 4 x 4 squares are left.
  for (int p = 0; p < 16; p += 4) {
    __m512 rows[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      rows[r] = _mm512_castps128_ps512(_mm_loadu_ps(row(r) + p));
      rows[r] = _mm512_insertf32x4(rows[r], _mm_loadu_ps(row(r + 4) + p), 1);
      rows[r] = _mm512_insertf32x4(rows[r], _mm_loadu_ps(row(r + 8) + p), 2);
      rows[r] = _mm512_insertf32x4(rows[r], _mm_loadu_ps(row(r + 12) + p), 3);
    }
    const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
    const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
    const __m512d other_low = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
    const __m512d other_high = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
    float* out = target + p * target_stride;
    const __m512d columns[4] = {
        _mm512_unpacklo_pd(low, other_low), _mm512_unpackhi_pd(low, other_low),
        _mm512_unpacklo_pd(high, other_high), _mm512_unpackhi_pd(high, other_high)};
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      _mm512_storeu_ps(out + r * target_stride, finish(_mm512_castpd_ps(columns[r])));
    }
  }
}
#endif

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <>
inline void transpose_square(const float* source, int64_t stride, float factor, float* target,
                             int64_t target_stride) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 scale = _mm512_set1_ps(factor);
  transpose_16x16([=](int r) { return source + r * stride; },
                  [=](__m512 column) { return column * scale; }, target, target_stride);
#else
  at::vec::transpose_mxn<float, 8, 8>(source, stride, target, target_stride);
  for (int p = 0; p < 8; ++p) {
    (Vector<float>::loadu(target + p * target_stride) * Vector<float>(factor))
        .store(target + p * target_stride);
  }
#endif
}
#endif

// packed[p, j] = factor b(p, j) for a panel of `columns` columns, filled up with zeros.
template <typename T>
inline void pack_panel(Strided<T> b, int64_t depth, int64_t columns, T factor, T* packed) {
  constexpr int64_t width = kGemmColumns<T>;
  constexpr int64_t lanes = Vector<T>::size();
  if (columns < width) std::fill(packed, packed + depth * width, T(0));
  int64_t done = 0;  // depth already packed by square transposes
  if (b.row == 1 && columns == width) {
    for (; done + lanes <= depth; done += lanes) {
      for (int64_t j = 0; j < width; j += lanes) {
        transpose_square(b.data + done + j * b.column, b.column, factor, packed + done * width + j,
                         width);
      }
    }
  }
  for (int64_t p = done; p < depth; ++p) {
    for (int64_t j = 0; j < columns; ++j) {
      packed[p * width + j] = factor * b.data[p * b.row + j * b.column];
    }
  }
}

// All panels of b[depth, columns].
template <typename T>
Panels<T> pack(Strided<T> b, int64_t depth, int64_t columns, T factor, T* packed) {
  constexpr int64_t width = kGemmColumns<T>;
  const Panels<T> panels = packed_panels(packed, depth);
  for (int64_t column = 0; column < columns; column += width) {
    pack_panel({b.data + column * b.column, b.row, b.column}, depth,
               std::min(width, columns - column), factor, packed + column / width * panels.panel);
  }
  return panels;
}

}  // namespace
}  // namespace driftar::cpu
