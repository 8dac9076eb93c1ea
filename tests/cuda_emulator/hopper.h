#pragma once

// The units of a Hopper multiprocessor that work beside its threads, for emulated_ptx_hopper.h.
// What they do happens as late as correct code allows: copies when no thread can go on, products
// when they are waited for. Until then their targets hold NaN.

#include "emulator.h"

#include <cuda.h>
#include <cuda_runtime.h>

namespace driftar::emulator {

// Where a pointer into shared memory lies in the address space of the block.
uint32_t shared_address(const void* pointer);

void init_barrier(uint64_t* barrier, uint32_t arrivals);
void arrive(uint64_t* barrier, uint32_t expected_bytes);
void wait_barrier(const uint64_t* barrier, uint32_t parity, const std::source_location& where);

void copy_tile(void* target, const CUtensorMap& tensor, uint64_t* barrier,
               const int (&coordinates)[5]);

// Arrives at a barrier of `threads` threads, and waits for the others if `waits`.
void named_barrier(int barrier, unsigned threads, bool waits, const std::source_location& where);

// sum [64, 2 count] = (sum +) A B as one of the 128 threads sees it.
struct WarpgroupProduct {
  float* sum;
  int count;
  const uint32_t* a;  // registers of A, or null: A lies at a_operand
  uint64_t a_operand, b_operand;
  bool accumulate, is_bf16;
  bool transposed;  // B lies as [16, n], not as [n, 16]
};

void fence_products();
void multiply_later(const WarpgroupProduct& product, const std::source_location& where);
void commit_products();
void wait_products(size_t groups_in_flight, const std::source_location& where);

}  // namespace driftar::emulator
