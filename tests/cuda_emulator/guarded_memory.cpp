// CPU tensors whose memory ends, but for alignment, at a page nobody may touch, so that a kernel
// that leaves a tensor is caught.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>

namespace {

constexpr size_t kAlignment = 16;  // of the widest access of a thread

struct Mapping {
  void* base;
  size_t bytes;
};

// PyTorch wants data pointers that are their own context.
std::mutex mutex;
std::unordered_map<void*, Mapping>& mappings() {
  static auto* const all = new std::unordered_map<void*, Mapping>;  // outlives every tensor
  return *all;
}

void release(void* data) {
  const std::lock_guard lock(mutex);
  const auto found = mappings().find(data);
  munmap(found->second.base, found->second.bytes);
  mappings().erase(found);
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t padded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t body = (padded + page - 1) / page * page;
    void* base = mmap(nullptr, body + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    char* end = static_cast<char*>(base) + body;
    mprotect(end, page, PROT_NONE);
    void* data = end - padded;
    const std::lock_guard lock(mutex);
    mappings()[data] = {base, body + page};
    return {data, data, &release, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* target, const void* source, size_t count) const override {
    std::memcpy(target, source, count);
  }
};

GuardedAllocator allocator;

}  // namespace

extern "C" __attribute__((visibility("default"))) void driftar_emulator_guard_memory() {
  c10::SetCPUAllocator(&allocator, 255);
}
