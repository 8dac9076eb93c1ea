#pragma once

// Every instruction that CUDA C++ does not spell, for sm_80 and later. The emulator of the tests
// implements the same functions in plain C++ (emulated_ptx.h on its include path).
//
// Fragments of a warp's matrix product D = A B + C (PTX ISA, "Matrix Fragments for mma"), for lane
// = 4 g + t:
//   m16n8k16, 16-bit: a[0..3] hold rows g, g + 8, g, g + 8 and columns 2 t, 2 t + 1 (+ 8 for a[2]
//     and a[3]); b[0..1] hold rows 2 t, 2 t + 1 (+ 8 for b[1]) of column g;
//   m16n8k8, tf32: a[0..3] hold (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b[0..1] hold
//     (t, g), (t + 4, g);
//   C and D, fp32: c[0..3] hold (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(__CUDACC__)
#include <emulated_ptx.h>
#else

namespace driftar::cuda {

// Dynamic shared memory of the block, aligned to 16 bytes.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 driftar_shared[];
  return driftar_shared;
}

namespace ptx {

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

__device__ __forceinline__ float widen_fp16(uint16_t bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}

// 2^x with a relative error of 2^-22; subnormal results are 0.
__device__ __forceinline__ float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// fp32 rounded to tf32 (10 bits of mantissa), to nearest with ties away from zero.
__device__ __forceinline__ uint32_t round_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_fp16(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit values. Lane i names row i % 8 of matrix i / 8 (16 aligned bytes)
// and receives of every matrix the columns 2 t, 2 t + 1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: rows 2 t, 2 t + 1 of column g.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copies the first `bytes` of 16 from global to shared memory and fills the rest with zeros, some
// time before the wait for its group returns. Both addresses are aligned to 16 bytes.
__device__ __forceinline__ void copy_async(void* target, const void* source, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(target)), "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most `groups` of this thread's latest groups are in flight.
template <int groups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(groups) : "memory");
}

}  // namespace ptx
}  // namespace driftar::cuda

#endif
