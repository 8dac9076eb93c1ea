// A product of two tiles by the units of Hopper, right and with planted faults, for the tests of
// the emulator itself.

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/numbers.cuh"
#include "../../csrc/cuda/ptx_hopper.cuh"

#include <cstring>

namespace driftar::cuda {
namespace {

constexpr int kPanel = 64, kInner = 64, kMultipliers = 128, kThreads = kMultipliers + kWarp;
// Shared memory: A [64, 64], then B in one or two panels, then barriers.
constexpr int kA = 0, kB = 64 * kPanel * 2, kBarriers = kB + 2 * 128 * kPanel * 2;

enum class Fault {
  none,
  unawaited_copy,
  unawaited_product,
  missing_fence,
  too_many_bytes,
  early_reuse,
  divergent_products,
  lonely_barrier,
  abandoned_barrier,
  abandoned_copy
};

struct ProductCall {
  Fault fault;
  int columns;      // of the result: 128, or 64 with A in registers
  bool transposed;  // B is [64, columns] and A in registers, else B is [columns, 64]
  CUtensorMap a, b;
  const uint16_t* a_values;  // [64, 64]
  float* out;                // [64, columns]
};

void copy_operands(const ProductCall& call, char* shared, uint64_t* full) {
  const int panels = call.transposed ? call.columns / kPanel : 1;
  const int rows = call.transposed ? kInner : call.columns;
  const int extra = call.fault == Fault::too_many_bytes ? 16 : 0;
  ptx::arrive_expecting(full, (64 + panels * rows) * kPanel * 2 + extra);
  ptx::copy_tile(shared + kA, call.a, full, 0, 0, 0, 0, 0);
  for (int panel = 0; panel < panels; ++panel) {
    ptx::copy_tile(shared + kB + panel * rows * kPanel * 2, call.b, full, panel * kPanel, 0, 0, 0,
                   0);
  }
}

template <int count>
void multiply(const ProductCall& call, char* shared) {
  const int lane = threadIdx.x, g = lane % kWarp / 4, t = lane % 4;
  float d[count] = {};
  uint32_t a[kInner / 16][4];
  for (int i = 0; i < kInner / 4; ++i) {
    const int row = lane / kWarp * 16 + g + 8 * (i % 2), k = i / 4 * 16 + i / 2 % 2 * 8 + 2 * t;
    std::memcpy(&a[i / 4][i % 4], call.a_values + row * kInner + k, 4);
  }
  const uint64_t left = ptx::operand(shared + kA, 0);
  const uint64_t right = ptx::operand(shared + kB, kInner * kPanel * 2);
  if (call.fault != Fault::missing_fence) ptx::fence_products();
  for (int k = 0; k < kInner; k += 16) {
    if (call.fault == Fault::divergent_products && lane >= 96 && k == 0) continue;
    if (call.transposed) {
      ptx::multiply<true>(d, a[k / 16], right + (k * kPanel * 2 >> 4));
    } else if constexpr (count == 64) {
      ptx::multiply<true>(d, left + (k * 2 >> 4), right + (k * 2 >> 4), k > 0);
    }
  }
  ptx::commit_products();
  if (call.fault == Fault::early_reuse) ptx::sync_threads(1, kThreads);
  if (call.fault != Fault::unawaited_product) ptx::wait_products<0>();
  for (int i = 0; i < count; ++i) {
    const int row = lane / kWarp * 16 + g + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * t + i % 2;
    call.out[row * call.columns + column] = d[i];
  }
  ptx::wait_products<0>();
}

void product_kernel(const ProductCall call) {
  auto* shared = static_cast<char*>(shared_memory());
  shared += -ptx::shared_address(shared) & 1023;
  auto* full = reinterpret_cast<uint64_t*>(shared + kBarriers);
  if (threadIdx.x == 0) {
    ptx::init_barrier(full, 1), ptx::init_barrier(full + 1, 1);
    ptx::publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kMultipliers) {
    if (call.fault != Fault::unawaited_copy) ptx::wait(full, 0);
    call.columns == 128 ? multiply<64>(call, shared) : multiply<32>(call, shared);
    if (call.fault == Fault::abandoned_barrier) ptx::arrive_threads(2, kThreads);
    if (call.fault == Fault::lonely_barrier) ptx::sync_threads(2, kThreads);
    return;
  }
  if (threadIdx.x == kMultipliers) copy_operands(call, shared, full);
  if (call.fault == Fault::early_reuse) ptx::sync_threads(1, kThreads);
  if (threadIdx.x != kMultipliers) return;
  if (call.fault == Fault::early_reuse) {
    copy_operands(call, shared, full + 1);
  } else if (call.fault == Fault::abandoned_copy) {
    ptx::wait(full, 0);
    ptx::copy_tile(shared + kA, call.a, full + 1, 0, 0, 0, 0, 0);
  }
  if (call.fault == Fault::unawaited_copy || call.fault == Fault::early_reuse) {
    ptx::wait(call.fault == Fault::early_reuse ? full + 1 : full, 0);
  }
}

struct TileCall {
  CUtensorMap tensor;
  uint16_t* out;  // [rows, 64], as it lies in shared memory
  int rows, column, row;
};

void tile_kernel(const TileCall call) {
  auto* shared = static_cast<char*>(shared_memory());
  shared += -ptx::shared_address(shared) & 1023;
  auto* full = reinterpret_cast<uint64_t*>(shared + kBarriers);
  if (threadIdx.x == 0) {
    ptx::init_barrier(full, 1);
    ptx::arrive_expecting(full, call.rows * kPanel * 2);
    ptx::copy_tile(shared, call.tensor, full, call.column, 0, call.row, 0, 0);
    ptx::wait(full, 0);
    std::memcpy(call.out, shared, call.rows * kPanel * 2);
  }
}

bool describe(CUtensorMap& map, const uint16_t* data, int rows, int columns, int box_rows) {
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(columns), 1, static_cast<cuuint64_t>(rows),
                               1, 1};
  const cuuint64_t row = static_cast<cuuint64_t>(columns) * 2, strides[4] = {row, row, row, row};
  const cuuint32_t box[5] = {kPanel, 1, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return cuTensorMapEncodeTiled(
             &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, const_cast<uint16_t*>(data), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

constexpr const char* kNames[] = {"none",
                                  "unawaited_copy",
                                  "unawaited_product",
                                  "missing_fence",
                                  "too_many_bytes",
                                  "early_reuse",
                                  "divergent_products",
                                  "lonely_barrier",
                                  "abandoned_barrier",
                                  "abandoned_copy"};

}  // namespace
}  // namespace driftar::cuda

#define EXPORTED extern "C" __attribute__((visibility("default")))

// out [64, columns] = A [64, 64] B of bf16, with the named fault; null, or what the emulator
// reports.
EXPORTED const char* driftar_emulator_warpgroup_product(const char* fault, int columns,
                                                        bool transposed, const uint16_t* a,
                                                        const uint16_t* b, float* out) {
  using namespace driftar::cuda;
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (std::strcmp(kNames[i], fault) != 0) continue;
    ProductCall call{static_cast<Fault>(i), columns, transposed, {}, {}, a, out};
    const int b_rows = transposed ? kInner : columns, b_columns = transposed ? columns : kInner;
    if (!describe(call.a, a, 64, kInner, 64) || !describe(call.b, b, b_rows, b_columns, b_rows)) {
      return "a tensor that cannot be described";
    }
    const LaunchShape shape{1, kThreads, kBarriers + 1024 + 16};
    const cudaError_t error = launch(product_kernel, shape, nullptr, call);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  return "no such fault";
}

// `out` becomes the box of `box_rows` rows at (row, column) of data [rows, columns] as a copy
// leaves it in shared memory.
EXPORTED const char* driftar_emulator_tile(const uint16_t* data, int rows, int columns,
                                           int box_rows, int row, int column, uint16_t* out) {
  using namespace driftar::cuda;
  TileCall call{{}, out, box_rows, column, row};
  if (!describe(call.tensor, data, rows, columns, box_rows)) {
    return "a tensor that cannot be described";
  }
  const cudaError_t error = launch(tile_kernel, {1, kWarp, kBarriers + 1024 + 16}, nullptr, call);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
