// Kernels with planted faults, which the emulator must report, and matrix products by the fragments
// of ptx.cuh, for the tests of the emulator itself.

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/numbers.cuh"
#include "../../csrc/cuda/reduce.cuh"

#include <cstring>

namespace driftar::cuda {
namespace {

constexpr int kThreads = 64;

struct FaultCall {
  bool faulty;
  float* out;  // [kThreads]
};

float* shared_floats() { return static_cast<float*>(shared_memory()); }

// Every thread reads what its neighbour wrote.
void missing_barrier(const FaultCall call) {
  const int i = threadIdx.x;
  shared_floats()[i] = static_cast<float>(i);
  if (!call.faulty) __syncthreads();
  call.out[i] = shared_floats()[(i + 1) % kThreads];
}

// A buffer is used twice; the second writer must wait for the readers.
void missing_second_barrier(const FaultCall call) {
  const int i = threadIdx.x;
  shared_floats()[i] = static_cast<float>(i);
  __syncthreads();
  const float value = shared_floats()[(i + 1) % kThreads];
  if (!call.faulty) __syncthreads();
  shared_floats()[i] = -1.0f;
  call.out[i] = value;
}

// Half of the threads do not come.
void missed_barrier(const FaultCall call) {
  const int i = threadIdx.x;
  if (i < kWarp || !call.faulty) __syncthreads();
  call.out[i] = static_cast<float>((i + 1) % kThreads);
}

// Half of the threads come to another one.
void divergent_barrier(const FaultCall call) {
  const int i = threadIdx.x;
  if (i < kWarp || !call.faulty) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  call.out[i] = static_cast<float>((i + 1) % kThreads);
}

void divergent_shuffle(const FaultCall call) {
  const int i = threadIdx.x;
  call.out[i] = static_cast<float>((i + 1) % kThreads);
  if (call.faulty && i % 2 == 1) return;
  warp_sum(1.0f);
}

void out_of_shared_memory(const FaultCall call) {
  const int i = threadIdx.x;
  shared_floats()[i + (call.faulty ? 4 : 0)] = 1.0f;
  call.out[i] = static_cast<float>((i + 1) % kThreads);
}

void missing_copy_wait(const FaultCall call) {
  const int i = threadIdx.x;
  call.out[i] = static_cast<float>((i + 1) % kThreads);
  __syncthreads();
  if (i % 4 == 0) ptx::copy_async(shared_floats() + i, call.out + i, 16);
  ptx::commit_copies();
  if (!call.faulty) ptx::wait_copies<0>();
  __syncthreads();
  call.out[i] = shared_floats()[i];
  ptx::wait_copies<0>();
}

// C [16, 8] = A [16, K] B [K, 8], K = 16 (bf16, fp16) or 8 (tf32), by the documented fragments.
struct ProductCall {
  int kind;  // 0 bf16, 1 fp16, 2 tf32, 3 fp16 through ldmatrix
  const float *a, *b;
  float* c;
};

void multiply(const ProductCall call) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float c[4] = {};
  uint32_t a[4], b[2];
  if (call.kind == 2) {
    for (int i = 0; i < 4; ++i) {
      a[i] = ptx::round_tf32(call.a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
    }
    for (int i = 0; i < 2; ++i) b[i] = ptx::round_tf32(call.b[(t + 4 * i) * 8 + g]);
    ptx::mma_tf32(c, a, b);
  } else if (call.kind == 3) {
    auto* shared = static_cast<Fp16*>(shared_memory());  // A [16, 16], then B [16, 8]
    for (int i = lane; i < 256; i += kWarp) shared[i] = narrow<Fp16>(call.a[i]);
    for (int i = lane; i < 128; i += kWarp) shared[256 + i] = narrow<Fp16>(call.b[i]);
    __syncwarp();
    ptx::load_matrices(a, shared + lane % 16 * 16 + lane / 16 * 8);
    uint32_t both[4];  // B needs two matrices only; the other two are the same again
    ptx::load_matrices_transposed(both, shared + 256 + lane % 16 * 8);
    b[0] = both[0], b[1] = both[1];
    ptx::mma_fp16(c, a, b);
  } else {
    const auto pair = [&](const float* low, const float* high) {
      return call.kind == 0 ? pack<Bf16>(*low, *high) : pack<Fp16>(*low, *high);
    };
    for (int i = 0; i < 4; ++i) {
      const float* first = call.a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
      a[i] = pair(first, first + 1);
    }
    for (int i = 0; i < 2; ++i) {
      const float* first = call.b + (2 * t + 8 * i) * 8 + g;
      b[i] = pair(first, first + 8);
    }
    call.kind == 0 ? ptx::mma_bf16(c, a, b) : ptx::mma_fp16(c, a, b);
  }
  for (int i = 0; i < 4; ++i) call.c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}

struct NamedKernel {
  const char* name;
  void (*kernel)(FaultCall);
};

constexpr NamedKernel kKernels[] = {
    {"missing_barrier", &missing_barrier},     {"missing_second_barrier", &missing_second_barrier},
    {"missed_barrier", &missed_barrier},       {"divergent_barrier", &divergent_barrier},
    {"divergent_shuffle", &divergent_shuffle}, {"out_of_shared_memory", &out_of_shared_memory},
    {"missing_copy_wait", &missing_copy_wait}};

}  // namespace
}  // namespace driftar::cuda

// Runs the named kernel; null, or what the emulator reports. out [64] should hold (i + 1) % 64.
extern "C" __attribute__((visibility("default"))) const char* driftar_emulator_run(const char* name,
                                                                                   bool faulty,
                                                                                   float* out) {
  using namespace driftar::cuda;
  for (const NamedKernel& each : kKernels) {
    if (std::strcmp(each.name, name) != 0) continue;
    const LaunchShape shape{1, kThreads, kThreads * sizeof(float)};
    const cudaError_t error = launch(each.kernel, shape, nullptr, FaultCall{faulty, out});
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  return "no such kernel";
}

extern "C" __attribute__((visibility("default"))) const char* driftar_emulator_multiply(
    int kind, const float* a, const float* b, float* c) {
  using namespace driftar::cuda;
  const cudaError_t error = launch(multiply, {1, kWarp, 1024}, nullptr, ProductCall{kind, a, b, c});
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
