#pragma once

// The functions of csrc/cuda/ptx.cuh in plain C++, by the fragment layouts documented there.

#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>

namespace driftar::cuda {

inline void* shared_memory() { return emulator::shared_memory(); }

namespace ptx {

inline uint32_t round_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t round_fp16(float value) {
  return std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}

inline uint32_t pack_bf16(float low, float high) {
  return round_bf16(low) | round_bf16(high) << 16;
}
inline uint32_t pack_fp16(float low, float high) {
  return round_fp16(low) | round_fp16(high) << 16;
}
inline float widen_fp16(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline float widen_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline float exp2(float x) {
  const float result = std::exp2(x);
  return std::fpclassify(result) == FP_SUBNORMAL ? 0.0f : result;
}

inline uint32_t round_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
}

// The multiplier ignores the 13 lowest bits of its operands.
inline float operand_tf32(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

struct Product {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

// `widen` makes a number of 16 bits.
template <float (*widen)(uint16_t)>
void multiply_16_bit(void* const* deposits, unsigned mask) {
  if (mask != 0xffffffffu) emulator::fault("mma of an incomplete warp");
  float a[16][16], b[16][8];
  const auto of = [&](int lane) { return static_cast<const Product*>(deposits[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = of(lane)->a[i / 2];
      a[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] =
          widen(static_cast<uint16_t>(word >> 16 * (i % 2)));
    }
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = of(lane)->b[i / 2];
      b[2 * t + i % 2 + 8 * (i / 2)][g] = widen(static_cast<uint16_t>(word >> 16 * (i % 2)));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = of(lane)->c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      of(lane)->c[i] = sum;
    }
  }
}

inline void multiply_tf32(void* const* deposits, unsigned mask) {
  if (mask != 0xffffffffu) emulator::fault("mma of an incomplete warp");
  float a[16][8], b[8][8];
  const auto of = [&](int lane) { return static_cast<const Product*>(deposits[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = operand_tf32(of(lane)->a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = operand_tf32(of(lane)->b[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = of(lane)->c[i];
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];
      of(lane)->c[i] = sum;
    }
  }
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     std::source_location where = std::source_location::current()) {
  Product own{c, a, b};
  emulator::meet_warp(0xffffffffu, &own, &multiply_16_bit<widen_bf16>, where);
}

inline void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     std::source_location where = std::source_location::current()) {
  Product own{c, a, b};
  emulator::meet_warp(0xffffffffu, &own, &multiply_16_bit<widen_fp16>, where);
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     std::source_location where = std::source_location::current()) {
  Product own{c, a, b};
  emulator::meet_warp(0xffffffffu, &own, &multiply_tf32, where);
}

struct MatrixRow {
  uint32_t* fragment;
  const void* row;
};

template <bool transposed>
void distribute_matrices(void* const* deposits, unsigned mask) {
  if (mask != 0xffffffffu) emulator::fault("ldmatrix of an incomplete warp");
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* source = static_cast<MatrixRow*>(deposits[8 * matrix + row])->row;
      if (reinterpret_cast<uintptr_t>(source) % 16) emulator::fault("misaligned row of ldmatrix");
      std::memcpy(values[row], source, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = transposed ? values[2 * t][g] : values[g][2 * t];
      const uint32_t high = transposed ? values[2 * t + 1][g] : values[g][2 * t + 1];
      static_cast<MatrixRow*>(deposits[lane])->fragment[matrix] = low | high << 16;
    }
  }
}

inline void load_matrices(uint32_t (&fragment)[4], const void* row,
                          std::source_location where = std::source_location::current()) {
  MatrixRow own{fragment, row};
  emulator::meet_warp(0xffffffffu, &own, &distribute_matrices<false>, where);
}

inline void load_matrices_transposed(uint32_t (&fragment)[4], const void* row,
                                     std::source_location where = std::source_location::current()) {
  MatrixRow own{fragment, row};
  emulator::meet_warp(0xffffffffu, &own, &distribute_matrices<true>, where);
}

inline void copy_async(void* target, const void* source, uint32_t bytes) {
  const auto addresses = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
  if (addresses % 16 != 0 || bytes > 16) emulator::fault("misaligned cp.async");
  emulator::copy_later(target, source, bytes, 16 - bytes);
}

inline void commit_copies() { emulator::commit_copies(); }

template <int groups>
void wait_copies() {
  emulator::wait_copies(groups);
}

}  // namespace ptx
}  // namespace driftar::cuda
