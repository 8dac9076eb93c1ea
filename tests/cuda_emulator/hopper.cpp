#include "hopper.h"

#include <emulated_ptx.h>

#include <array>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <vector>

namespace driftar::emulator {

namespace {

// Not aligned to the period of a swizzle, as the memory of a block need not be.
constexpr uint32_t kSharedStart = 0x410;
constexpr unsigned kWarpgroup = 128;

uint64_t swizzled(uint64_t address) { return address ^ (address >> 7 & 7) << 4; }

std::byte* shared_pointer(uint64_t address) { return shared_memory() + (address - kSharedStart); }

// --- barriers with transactions -----------------------------------------------------------------

// In the 8 bytes that the barrier has.
struct Barrier {
  uint32_t phase : 1, tag : 7, arrivals : 12, pending : 12;
  int32_t bytes;  // expected minus arrived

  static constexpr uint32_t kTag = 0x2a;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

Barrier& barrier_at(const uint64_t* barrier) {
  auto& found = *reinterpret_cast<Barrier*>(const_cast<uint64_t*>(barrier));
  if (found.tag != Barrier::kTag) fault("a barrier that was not initialised");
  return found;
}

void advance(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
}

// --- tensors ------------------------------------------------------------------------------------

struct TensorMap {
  static constexpr uint64_t kTag = 0x64726966746172;

  uint64_t tag;
  const std::byte* data;
  uint64_t sizes[5], strides[4];  // strides in bytes
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

constexpr uint64_t kElement = 2, kRowBytes = 128;

void fill_box(const TensorMap& map, const std::array<int64_t, 5>& first, uint64_t target) {
  for (int e = 0; e < map.box[4]; ++e) {
    for (int d = 0; d < map.box[3]; ++d) {
      for (int c = 0; c < map.box[2]; ++c) {
        for (int b = 0; b < map.box[1]; ++b, target += kRowBytes) {
          const int64_t at[4] = {first[1] + b, first[2] + c, first[3] + d, first[4] + e};
          bool inside = true;
          uint64_t offset = 0;
          for (int i = 0; i < 4; ++i) {
            inside = inside && at[i] >= 0 && static_cast<uint64_t>(at[i]) < map.sizes[i + 1];
            offset += static_cast<uint64_t>(at[i]) * map.strides[i];
          }
          for (int a = 0; a < map.box[0]; ++a) {
            const int64_t column = first[0] + a;
            uint16_t value = 0;
            if (inside && column >= 0 && static_cast<uint64_t>(column) < map.sizes[0]) {
              std::memcpy(&value, map.data + offset + static_cast<uint64_t>(column) * kElement,
                          kElement);
            }
            std::memcpy(shared_pointer(swizzled(target + static_cast<uint64_t>(a) * kElement)),
                        &value, kElement);
          }
        }
      }
    }
  }
}

// --- the block ----------------------------------------------------------------------------------

struct NamedBarrier {
  unsigned threads = 0, arrived = 0;
  uint64_t rounds = 0;
};

struct Products {
  std::vector<WarpgroupProduct> open;
  std::deque<std::vector<WarpgroupProduct>> groups;
  std::map<float*, std::vector<float>> sums;  // what registers in flight held
  size_t allowed = 0;
  bool fenced = false;
};

struct Meeting {
  unsigned arrived = 0;
  uint64_t rounds = 0;
};

struct Block {
  uint64_t number = std::numeric_limits<uint64_t>::max();
  unsigned ended = 0;
  NamedBarrier barriers[16];
  Meeting meetings[1024 / kWarpgroup];
  std::vector<Products> products;
};

Block current;

// Of the running block, new at its first use.
Block& block() {
  if (current.number != block_number()) {
    current = {};
    current.number = block_number();
    current.products.resize(place().block_size.x);
  }
  return current;
}

unsigned thread() { return place().thread.x; }

void end_of_thread() {
  if (current.number != block_number()) return;  // nothing of Hopper was used
  Block& own = current;
  const Products& products = own.products[thread()];
  if (!products.open.empty() || !products.groups.empty()) {
    fault("a thread ends without waiting for its products");
  }
  if (++own.ended < place().block_size.x) return;
  for (const NamedBarrier& each : own.barriers) {
    if (each.arrived != 0) fault("a block ends with threads at a named barrier");
  }
}

const bool checks_threads = [] {
  at_end_of_thread(&end_of_thread);
  return true;
}();

struct Round {
  const uint64_t* rounds;
  uint64_t seen;
};
bool has_passed(const void* argument) {
  const auto& own = *static_cast<const Round*>(argument);
  return *own.rounds != own.seen;
}

// --- products -----------------------------------------------------------------------------------

struct Operand {
  uint64_t start, leading, stride;
};

Operand decoded(uint64_t operand) {
  const auto field = [&](int shift) { return (operand >> shift & 0x3fff) << 4; };
  if (operand >> 62 != 1 || (operand >> 49 & 7) != 0) {
    fault("an operand that is not swizzled by 128 bytes");
  }
  return {field(0), field(16), field(32)};
}

float widened(uint16_t bits, bool is_bf16) {
  return is_bf16 ? cuda::ptx::widen_bf16(bits) : cuda::ptx::widen_fp16(bits);
}

float element(uint64_t address, bool is_bf16) {
  uint16_t bits;
  std::memcpy(&bits, shared_pointer(swizzled(address)), sizeof bits);
  return widened(bits, is_bf16);
}

// Element (i, k) where k runs along the rows of 128 bytes ("K-major").
float element_of_rows(const Operand& x, uint64_t i, uint64_t k, bool is_bf16) {
  return element(x.start + i / 8 * x.stride + i % 8 * kRowBytes + k * kElement, is_bf16);
}

// Element (k, n) where n runs along the rows ("MN-major"), 64 columns a panel.
float element_of_columns(const Operand& x, uint64_t k, uint64_t n, bool is_bf16) {
  return element(
      x.start + n / 64 * x.leading + n % 64 * kElement + k / 8 * x.stride + k % 8 * kRowBytes,
      is_bf16);
}

using Sums = std::array<std::array<float, 128>, 64>;

// visit(row, column, index) of the accumulators of a thread.
template <typename Visit>
void each_sum(unsigned lane, int count, Visit&& visit) {
  const unsigned g = lane % 32 / 4, t = lane % 4;
  for (int i = 0; i < count; ++i) {
    visit(lane / 32 * 16 + g + 8 * (i / 2 % 2), i / 4 * 8 + 2 * t + i % 2, i);
  }
}

void multiply(const WarpgroupProduct* const* of_threads, Sums& sums) {
  const WarpgroupProduct& first = *of_threads[0];
  const unsigned columns = static_cast<unsigned>(first.count) * 2;
  float a[64][16], b[16][128];
  for (unsigned lane = 0; lane < kWarpgroup && first.a != nullptr; ++lane) {
    const unsigned g = lane % 32 / 4, t = lane % 4;
    for (unsigned i = 0; i < 8; ++i) {
      const uint32_t word = of_threads[lane]->a[i / 2];
      a[lane / 32 * 16 + g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] =
          widened(static_cast<uint16_t>(word >> 16 * (i % 2)), first.is_bf16);
    }
  }
  if (first.a == nullptr) {
    const Operand left = decoded(first.a_operand);
    for (unsigned i = 0; i < 64; ++i) {
      for (unsigned k = 0; k < 16; ++k) a[i][k] = element_of_rows(left, i, k, first.is_bf16);
    }
  }
  const Operand right = decoded(first.b_operand);
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned n = 0; n < columns; ++n) {
      b[k][n] = first.transposed ? element_of_columns(right, k, n, first.is_bf16)
                                 : element_of_rows(right, n, k, first.is_bf16);
    }
  }
  for (unsigned i = 0; i < 64; ++i) {
    if (!first.accumulate) sums[i].fill(0);
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned n = 0; n < columns; ++n) sums[i][n] += a[i][k] * b[k][n];
    }
  }
}

// Takes one group of products of every thread of the warpgroup to its end.
void retire_group(Products* threads) {
  std::vector<WarpgroupProduct> groups[kWarpgroup];
  for (unsigned lane = 0; lane < kWarpgroup; ++lane) {
    if (threads[lane].groups.empty()) fault("warps of a warpgroup have different products");
    groups[lane] = std::move(threads[lane].groups.front());
    threads[lane].groups.pop_front();
    if (groups[lane].size() != groups[0].size()) {
      fault("warps of a warpgroup have different products");
    }
  }
  Sums sums;
  for (size_t i = 0; i < groups[0].size(); ++i) {
    const WarpgroupProduct* products[kWarpgroup];
    for (unsigned lane = 0; lane < kWarpgroup; ++lane) {
      const WarpgroupProduct& own = groups[lane][i];
      products[lane] = &own;
      if (own.a_operand != products[0]->a_operand || own.b_operand != products[0]->b_operand ||
          own.count != products[0]->count || own.accumulate != products[0]->accumulate) {
        fault("warps of a warpgroup have different products");
      }
      const std::vector<float>& held = threads[lane].sums.at(own.sum);
      each_sum(lane, own.count,
               [&](unsigned row, unsigned column, int at) { sums[row][column] = held[at]; });
    }
    multiply(products, sums);
    for (unsigned lane = 0; lane < kWarpgroup; ++lane) {
      std::vector<float>& held = threads[lane].sums.at(groups[lane][i].sum);
      each_sum(lane, products[lane]->count,
               [&](unsigned row, unsigned column, int at) { held[at] = sums[row][column]; });
    }
  }
}

// Accumulators that nothing in flight names any more return to their registers.
void return_sums(Products& own) {
  for (auto at = own.sums.begin(); at != own.sums.end();) {
    bool in_flight = false;
    for (const auto& group : own.groups) {
      for (const WarpgroupProduct& each : group) in_flight = in_flight || each.sum == at->first;
    }
    for (const WarpgroupProduct& each : own.open) in_flight = in_flight || each.sum == at->first;
    if (in_flight) {
      ++at;
      continue;
    }
    std::memcpy(at->first, at->second.data(), at->second.size() * sizeof(float));
    at = own.sums.erase(at);
  }
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  return kSharedStart +
         static_cast<uint32_t>(static_cast<const std::byte*>(pointer) - shared_memory());
}

void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0 || arrivals == 0) {
    fault("a barrier that is misaligned or that nobody comes to");
  }
  block();  // from here on the ends of threads count
  const Barrier fresh{0, Barrier::kTag, arrivals, arrivals, 0};
  std::memcpy(barrier, &fresh, sizeof fresh);
}

void arrive(uint64_t* barrier, uint32_t expected_bytes) {
  Barrier& found = barrier_at(barrier);
  found.bytes += static_cast<int32_t>(expected_bytes);
  if (found.pending == 0) fault("more arrivals than a barrier counts");
  --found.pending;
  advance(found);
}

void wait_barrier(const uint64_t* barrier, uint32_t parity, const std::source_location& where) {
  struct Phase {
    const uint64_t* barrier;
    uint32_t parity;
  } phase{barrier, parity};
  barrier_at(barrier);
  wait_until(
      [](const void* argument) {
        const auto& own = *static_cast<const Phase*>(argument);
        return reinterpret_cast<const Barrier*>(own.barrier)->phase != own.parity;
      },
      &phase, where);
}

void copy_tile(void* target, const CUtensorMap& tensor, uint64_t* barrier,
               const int (&coordinates)[5]) {
  TensorMap map;
  std::memcpy(&map, tensor.opaque, sizeof map);
  if (map.tag != TensorMap::kTag) fault("a copy of a tensor that was not described");
  barrier_at(barrier);
  const uint64_t address = shared_address(target);
  if (address % 1024 != 0) fault("a tile that does not start with the swizzle's period");
  size_t rows = 1;
  for (int i = 1; i < 5; ++i) rows *= map.box[i];
  std::memset(target, 0xff, rows * kRowBytes);
  std::array<int64_t, 5> first;
  std::copy(coordinates, coordinates + 5, first.begin());
  later([=] {
    fill_box(map, first, address);
    Barrier& found = barrier_at(barrier);
    found.bytes -= static_cast<int32_t>(rows * kRowBytes);
    advance(found);
  });
}

void named_barrier(int barrier, unsigned threads, bool waits, const std::source_location& where) {
  if (barrier < 1 || barrier > 15 || threads % 32 != 0) fault("no such named barrier");
  NamedBarrier& own = block().barriers[barrier];
  if (own.arrived == 0) own.threads = threads;
  if (own.threads != threads) fault("threads of a named barrier disagree about their number");
  const Round round{&own.rounds, own.rounds};
  if (++own.arrived == threads) {
    own.arrived = 0;
    ++own.rounds;
  } else if (waits) {
    wait_until(&has_passed, &round, where);
  }
}

void fence_products() { block().products[thread()].fenced = true; }

void multiply_later(const WarpgroupProduct& product, const std::source_location& where) {
  Products& own = block().products[thread()];
  if (!own.fenced) fault("a product before wgmma.fence, line " + std::to_string(where.line()));
  if (own.sums.find(product.sum) == own.sums.end()) {
    own.sums[product.sum].assign(product.sum, product.sum + product.count);
    std::fill(product.sum, product.sum + product.count, std::numeric_limits<float>::quiet_NaN());
  }
  own.open.push_back(product);
}

void commit_products() {
  Products& own = block().products[thread()];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

void wait_products(size_t groups_in_flight, const std::source_location& where) {
  const unsigned first = thread() / kWarpgroup * kWarpgroup;
  Products* threads = &block().products[first];
  Meeting& meeting = block().meetings[first / kWarpgroup];
  threads[thread() - first].allowed = groups_in_flight;
  const Round round{&meeting.rounds, meeting.rounds};
  if (++meeting.arrived < kWarpgroup) return wait_until(&has_passed, &round, where);
  while (threads[0].groups.size() > groups_in_flight) retire_group(threads);
  for (unsigned lane = 0; lane < kWarpgroup; ++lane) {
    Products& own = threads[lane];
    if (own.allowed != groups_in_flight || own.groups.size() > groups_in_flight) {
      fault("warps of a warpgroup wait for different products");
    }
    return_sums(own);
    own.fenced = false;
  }
  meeting.arrived = 0;
  ++meeting.rounds;
}

}  // namespace driftar::emulator

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  using driftar::emulator::TensorMap;
  TensorMap made{TensorMap::kTag, static_cast<const std::byte*>(address), {}, {}, {}};
  bool fine = rank == 5 && reinterpret_cast<uintptr_t>(address) % 16 == 0 && box[0] == 64 &&
              reinterpret_cast<uintptr_t>(map) % 64 == 0;
  for (cuuint32_t i = 0; i < 5; ++i) {
    fine = fine && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 &&
           steps[i] == 1;
    made.sizes[i] = sizes[i], made.box[i] = static_cast<uint16_t>(box[i]);
  }
  for (cuuint32_t i = 0; i < 4; ++i) {
    fine = fine && strides[i] > 0 && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
    made.strides[i] = strides[i];
  }
  std::memcpy(map->opaque, &made, sizeof made);
  return fine ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
