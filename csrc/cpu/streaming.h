#pragma once

// Large results that are read much later, written past the caches: any other store first reads the
// lines that it overwrites, and drives others out. Only for files compiled per instruction set.

#include "vector.h"

#include <cstdint>
#include <cstring>

namespace driftar::cpu {
namespace {

// Whole cache lines go past the caches, other rows are copied.
template <typename T>
void stream_row(const T* row, int64_t count, T* target) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if (reinterpret_cast<uintptr_t>(target) % 64 == 0 && count % line == 0) {
    for (int64_t i = 0; i < count; i += line) {
#if defined(CPU_CAPABILITY_AVX512)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(row + i));
#else
      for (int64_t half = i; half < i + line; half += line / 2) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(target + half),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + half)));
      }
#endif
    }
    return;
  }
#endif
  std::memcpy(target, row, count * sizeof(T));
}

// Other threads see what this one has streamed.
inline void finish_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace driftar::cpu
