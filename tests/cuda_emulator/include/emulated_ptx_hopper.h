#pragma once

// The functions of csrc/cuda/ptx_hopper.cuh on the emulator.

#include "../hopper.h"

namespace driftar::cuda::ptx {

constexpr bool kHopper = true;

using Where = std::source_location;

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

inline void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  emulator::init_barrier(barrier, arrivals);
}
inline void arrive(uint64_t* barrier) { emulator::arrive(barrier, 0); }
inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  emulator::arrive(barrier, bytes);
}
inline void wait(const uint64_t* barrier, uint32_t parity, Where where = Where::current()) {
  emulator::wait_barrier(barrier, parity, where);
}

// Memory is ordered here as soon as threads are.
inline void publish_barriers() {}
inline void fence_async_proxy() {}

inline void copy_tile(void* target, const CUtensorMap& tensor, uint64_t* barrier, int c0, int c1,
                      int c2, int c3, int c4) {
  emulator::copy_tile(target, tensor, barrier, {c0, c1, c2, c3, c4});
}

inline void sync_threads(int barrier, int threads, Where where = Where::current()) {
  emulator::named_barrier(barrier, static_cast<unsigned>(threads), true, where);
}
inline void arrive_threads(int barrier, int threads, Where where = Where::current()) {
  emulator::named_barrier(barrier, static_cast<unsigned>(threads), false, where);
}

template <int registers>
void grow_registers() {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0);
}
template <int registers>
void shrink_registers() {
  grow_registers<registers>();
}

template <typename T, int count>
void pin(T (&)[count]) {}

inline void fence_products() { emulator::fence_products(); }
inline void commit_products() { emulator::commit_products(); }
template <int groups>
void wait_products(Where where = Where::current()) {
  emulator::wait_products(groups, where);
}

template <bool is_bf16>
void multiply(float (&d)[64], uint64_t a, uint64_t b, int accumulate,
              Where where = Where::current()) {
  emulator::multiply_later({d, 64, nullptr, a, b, accumulate != 0, is_bf16, false}, where);
}
template <bool is_bf16, int count>
void multiply(float (&d)[count], const uint32_t (&a)[4], uint64_t b,
              Where where = Where::current()) {
  static_assert(count == 32 || count == 64);
  emulator::multiply_later({d, count, a, 0, b, true, is_bf16, true}, where);
}

}  // namespace driftar::cuda::ptx
