// The C library returns blocks of this size to the system as soon as they are freed. The next one
// is then faulted in and cleared page by page, which takes longer than to fill it; on a virtual
// machine whose host takes free pages back, many times as long (docs/memory.md has figures).

#include "large_blocks.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <c10/core/CPUAllocator.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <string>

namespace driftar::cpu {

namespace {

constexpr size_t kDefaultMegabytes = 128;
constexpr size_t kHugePage = 1 << 21;

struct Block {
  at::DataPtr memory;
  size_t size;
};

// Fewer pages mean fewer faults; a refusal leaves ordinary pages.
void ask_for_huge_pages(const Block& block) {
#if defined(__linux__)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(block.memory.get());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + block.size) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

size_t store_limit() {
  const char* value = std::getenv("DRIFTAR_KERNELS_CACHE_MB");
  if (value == nullptr || *value == '\0') return kDefaultMegabytes << 20;
  const std::string digits = value;
  TORCH_CHECK_VALUE(
      digits.find_first_not_of("0123456789") == std::string::npos && digits.size() <= 9,
      "DRIFTAR_KERNELS_CACHE_MB must be a number of megabytes, got ", digits);
  return std::stoull(digits) << 20;
}

// Blocks that nobody uses, the last one given back first. Nobody waits for another thread here, nor
// a forked child for one that it does not have: who finds the store taken goes without.
class Store {
 public:
  explicit Store(size_t limit) : limit_(limit) {}

  // A block that is large enough without wasting a quarter of it, or none. Then the oldest ones
  // make room for the new one: sizes that are no longer asked for must not fill the store.
  std::unique_ptr<Block> take(size_t size) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return nullptr;
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = (*block)->size >= size && (*block)->size - size <= (*block)->size / 4;
      if (fits && (best == blocks_.end() || (*block)->size < (*best)->size)) best = block;
    }
    if (best == blocks_.end()) {
      shrink(limit_ - std::min(limit_, size));
      return nullptr;
    }
    std::unique_ptr<Block> result = std::move(*best);
    blocks_.erase(best);
    total_ -= result->size;
    return result;
  }

  void give(std::unique_ptr<Block> block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || block->size > limit_) return;
    shrink(limit_ - block->size);
    total_ += block->size;
    blocks_.push_front(std::move(block));
  }

 private:
  void shrink(size_t most) {
    for (; total_ > most; blocks_.pop_back()) total_ -= blocks_.back()->size;
  }

  std::mutex mutex_;
  std::list<std::unique_ptr<Block>> blocks_;
  size_t total_ = 0;
  const size_t limit_;
};

class LargeAllocator final : public c10::Allocator {
 public:
  at::DataPtr allocate(size_t size) override {
    size = (size + kHugePage - 1) / kHugePage * kHugePage;
    std::unique_ptr<Block> block = store_.take(size);
    if (block == nullptr) {
      block = std::make_unique<Block>(c10::GetCPUAllocator()->allocate(size), size);
      ask_for_huge_pages(*block);
    }
    void* const data = block->memory.get();
    return {data, block.release(), &give_back, at::Device(at::kCPU)};
  }

  void copy_data(void* target, const void* source, size_t size) const override {
    default_copy_data(target, source, size);
  }

  // Lives as long as the process: tensors may outlive every static object.
  static LargeAllocator& instance() {
    static LargeAllocator& allocator = *new LargeAllocator;
    return allocator;
  }

 private:
  LargeAllocator() : store_(store_limit()) {}

  static void give_back(void* block) {
    instance().store_.give(std::unique_ptr<Block>(static_cast<Block*>(block)));
  }

  Store store_;
};

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t count = c10::multiply_integers(sizes);
  const size_t size = static_cast<size_t>(count) * options.dtype().itemsize();
  // Where PyTorch fills fresh memory, to show what was not written, it must fill this too.
  const bool filled = at::globalContext().deterministicAlgorithms() &&
                      at::globalContext().deterministicFillUninitializedMemory();
  if (size < kLargeBytes || filled) return at::cpu::empty(sizes, options);
  return at::Tensor(at::detail::empty_generic(
      sizes, &LargeAllocator::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
      c10::typeMetaToScalarType(options.dtype()), std::nullopt));
}

}  // namespace driftar::cpu
