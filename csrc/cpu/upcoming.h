#pragma once

// Rows that are needed next, asked for a few cache lines at a time while products are computed. A
// core waits for few lines at once, and the processor's own prefetching starts anew on every page:
// asked for together, or not at all, rows from beyond the L2 cache hold the products up. Only for
// kernel files.

#include "rows.h"

#include <algorithm>
#include <cstdint>

namespace driftar::cpu {
namespace {

class Upcoming {
  static constexpr int64_t kLine = 64;       // bytes
  static constexpr int64_t kMostLines = 24;  // at a time
  static constexpr int64_t kSpans = 12;

  struct Span {
    const char* row;
    int64_t rows, stride, bytes;  // stride from row to row
  };

  Span spans[kSpans];
  int64_t current = 0, count = 0, done = 0;  // spans; bytes asked for of the current row
  int64_t portion = 0;                       // lines

 public:
  // Forgets what was not asked for yet.
  void clear() { current = count = done = 0; }

  // `rows` rows of `width` elements; from kSpans calls on, nothing more.
  template <typename T>
  void add(Rows<T> first, int64_t rows, int64_t width) {
    if (rows <= 0 || width <= 0 || count == kSpans) return;
    const int64_t size = sizeof(T);
    const bool adjacent = first.stride == width;
    spans[count++] = {reinterpret_cast<const char*>(first.data), adjacent ? 1 : rows,
                      first.stride * size, (adjacent ? rows * width : width) * size};
  }

  // Divides what was added among the next `turns` calls of ask().
  void divide(int64_t turns) {
    int64_t lines = 0;
    for (int64_t s = 0; s < count; ++s) {
      lines += spans[s].rows * ((spans[s].bytes + kLine - 1) / kLine);
    }
    turns = std::max<int64_t>(turns, 1);
    portion = std::min((lines + turns - 1) / turns, kMostLines);
  }

  void ask() {
    int64_t left = portion;
    while (left > 0 && current < count) {
      Span& span = spans[current];
      const int64_t end = std::min(done + left * kLine, span.bytes);
      for (; done < end; done += kLine, --left) {
        __builtin_prefetch(span.row + done, /*rw=*/0, /*locality=*/2);
      }
      if (done < span.bytes) return;
      done = 0;
      span.row += span.stride;
      if (--span.rows == 0) ++current;
    }
  }
};

}  // namespace
}  // namespace driftar::cpu
