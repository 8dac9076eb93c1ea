#include "emulator.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace driftar::emulator {

namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr unsigned kLanes = 32, kMaxThreads = 1024;
constexpr size_t kMaxShared = size_t{227} << 10;

// --- switching stacks ---------------------------------------------------------------------------

#if defined(__x86_64__)

// Saves the registers that a call preserves, and resumes another stack.
extern "C" void driftar_emulator_switch(void** save, void* resume);
asm(R"(
.text
.globl driftar_emulator_switch
.hidden driftar_emulator_switch
.type driftar_emulator_switch, @function
driftar_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size driftar_emulator_switch, .-driftar_emulator_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(std::byte* stack, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // the entry never returns
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
  }

  void switch_to(Context& other) { driftar_emulator_switch(&stack_pointer, other.stack_pointer); }
};

#else

struct Context {
  ucontext_t state{};

  void prepare(std::byte* stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = kStackBytes;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }

  void switch_to(Context& other) { swapcontext(&state, &other.state); }
};

#endif

// --- the machine --------------------------------------------------------------------------------

struct Copy {
  void* target;
  const void* source;
  size_t bytes, zero_filled;
};

enum class State { ready, at_barrier, in_warp, waiting, finished };

struct Fiber {
  Context context;
  std::byte* stack = nullptr;
  Place place;
  State state = State::finished;
  std::source_location where;
  unsigned mask = 0;
  Combine combine = nullptr;
  void* deposit = nullptr;
  bool (*is_ready)(const void*) = nullptr;
  const void* argument = nullptr;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

struct Machine {
  std::mutex mutex;
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned threads = 0, finished = 0, waiting = 0;
  Context scheduler;
  Fiber* running = nullptr;
  std::byte* shared = nullptr;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  std::string message;
  std::vector<std::function<void()>> pending;
  std::vector<void (*)()> checks;
  uint64_t blocks = 0;
  bool faulty = false;
  uint64_t seed = 0;
  int order = 2;
};

Machine machine;

size_t page_size() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

// `bytes` that end, but for alignment, at a page nobody may touch.
std::byte* guarded_memory(size_t bytes, size_t alignment, void** base, size_t* mapped) {
  const size_t padded = (bytes + alignment - 1) / alignment * alignment;
  const size_t body = (padded + page_size() - 1) / page_size() * page_size();
  *mapped = body + page_size();
  *base = mmap(nullptr, *mapped, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*base == MAP_FAILED) {
    std::perror("driftar emulator: mmap");
    std::abort();
  }
  mprotect(static_cast<std::byte*>(*base) + body, page_size(), PROT_NONE);
  return static_cast<std::byte*>(*base) + body - padded;
}

std::string describe(const std::source_location& where) {
  const std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

std::string describe(const Fiber& fiber) {
  return "block " + std::to_string(fiber.place.block.x) + " thread " +
         std::to_string(fiber.place.thread.x);
}

void pause(State state) {
  Fiber& fiber = *machine.running;
  fiber.state = state;
  fiber.context.switch_to(machine.scheduler);
}

void run_fiber() {
  machine.body(machine.argument);
  Fiber& fiber = *machine.running;
  for (const auto& group : fiber.groups) {
    if (!group.empty()) fault(describe(fiber) + " ends without waiting for its copies");
  }
  if (!fiber.uncommitted.empty()) fault(describe(fiber) + " ends with uncommitted copies");
  for (const auto check : machine.checks) check();
  ++machine.finished;
  pause(State::finished);
  std::abort();  // a finished fiber is never resumed
}

void on_bad_access(int, siginfo_t* info, void*) {
  if (machine.running == nullptr) {
    signal(SIGSEGV, SIG_DFL);
    raise(SIGSEGV);
    return;
  }
  char text[64];
  std::snprintf(text, sizeof text, " reads or writes out of bounds, at %p", info->si_addr);
  fault(describe(*machine.running) + text);
}

void order_fibers(std::vector<unsigned>& order, std::mt19937_64& random) {
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order == 2) std::shuffle(order.begin(), order.end(), random);
}

std::string deadlock() {
  std::string text = "deadlock:";
  unsigned shown = 0;
  for (unsigned i = 0; i < machine.threads && shown < 4; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    if (fiber.state == State::finished) continue;
    text += " " + describe(fiber) + " waits at " + describe(fiber.where) + ";";
    ++shown;
  }
  return text + " " + std::to_string(machine.finished) + " threads have ended";
}

void release_barrier() {
  const std::source_location& first = machine.fibers[0]->where;
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    if (fiber.where.line() != first.line() ||
        std::strcmp(fiber.where.file_name(), first.file_name()) != 0) {
      machine.faulty = true;
      machine.message = "divergent barrier: " + describe(*machine.fibers[0]) + " waits at " +
                        describe(first) + ", " + describe(fiber) + " at " + describe(fiber.where);
      return;
    }
    fiber.state = State::ready;
  }
  machine.waiting = 0;
}

// Lets one of the other units work; which one is not known either.
bool work_elsewhere(std::mt19937_64& random) {
  if (machine.pending.empty()) return false;
  std::swap(machine.pending[random() % machine.pending.size()], machine.pending.back());
  const auto work = std::move(machine.pending.back());
  machine.pending.pop_back();
  try {
    work();
  } catch (const std::runtime_error& error) {
    machine.faulty = true;
    machine.message = error.what();
  }
  return true;
}

void run_block(std::mt19937_64& random) {
  std::vector<unsigned> order(machine.threads);
  while (!machine.faulty && machine.finished < machine.threads) {
    order_fibers(order, random);
    bool progress = false;
    for (const unsigned i : order) {
      Fiber& fiber = *machine.fibers[i];
      if (fiber.state == State::waiting && fiber.is_ready(fiber.argument)) {
        fiber.state = State::ready;
      }
      if (fiber.state != State::ready) continue;
      progress = true;
      machine.running = &fiber;
      machine.scheduler.switch_to(fiber.context);
      machine.running = nullptr;
      if (machine.faulty) return;
    }
    if (machine.waiting == machine.threads) {
      release_barrier();
    } else if (!progress && machine.finished < machine.threads && !work_elsewhere(random)) {
      machine.faulty = true;
      machine.message = deadlock();
    }
  }
  if (!machine.faulty && !machine.pending.empty()) {
    machine.faulty = true;
    machine.message = "a block ends with copies in flight";
  }
}

void start_block(Index grid, Index block, unsigned block_index) {
  machine.finished = machine.waiting = 0;
  machine.pending.clear();
  ++machine.blocks;
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.place = {{i, 0, 0}, {block_index, 0, 0}, block, grid};
    fiber.state = State::ready;
    fiber.uncommitted.clear();
    fiber.groups.clear();
    fiber.context.prepare(fiber.stack, &run_fiber);
  }
}

}  // namespace

const Place& place() { return machine.running->place; }

std::byte* shared_memory() { return machine.shared; }

int capability() {
  const char* chosen = std::getenv("DRIFTAR_CUDA_EMULATED_CAPABILITY");
  return chosen == nullptr ? 80 : std::atoi(chosen);
}

const char* fault_message() { return machine.message.c_str(); }

void fault(const std::string& message) {
  if (machine.running == nullptr) throw std::runtime_error(message);  // outside of the threads
  machine.faulty = true;
  machine.message = message;
  pause(State::finished);
  std::abort();  // a fiber at fault is never resumed
}

bool launch(Index grid, Index block, size_t shared_bytes, void (*body)(const void*),
            const void* argument) {
  const std::lock_guard lock(machine.mutex);
  machine.faulty = false;
  machine.threads = block.x;
  machine.body = body;
  machine.argument = argument;
  if (block.x == 0 || block.x > kMaxThreads || grid.x == 0 || grid.x > 0x7fffffffu ||
      shared_bytes > kMaxShared) {
    machine.message = "invalid launch: " + std::to_string(grid.x) + " blocks of " +
                      std::to_string(block.x) + " threads with " + std::to_string(shared_bytes) +
                      " bytes";
    return false;
  }
  while (machine.fibers.size() < block.x) {
    auto fiber = std::make_unique<Fiber>();
    void* base;
    size_t mapped;
    fiber->stack = guarded_memory(kStackBytes, 16, &base, &mapped);
    machine.fibers.push_back(std::move(fiber));
  }
  struct sigaction action{}, previous_segv, previous_bus;
  action.sa_sigaction = &on_bad_access;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);

  void* base;
  size_t mapped;
  machine.shared = guarded_memory(shared_bytes, 16, &base, &mapped);
  std::mt19937_64 random(machine.seed++);
  for (unsigned i = 0; i < grid.x && !machine.faulty; ++i) {
    std::memset(machine.shared, 0xff, shared_bytes);
    start_block(grid, block, machine.order == 0 ? i : grid.x - 1 - i);
    run_block(random);
  }
  munmap(base, mapped);
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  return !machine.faulty;
}

void block_barrier(const std::source_location& where) {
  machine.running->where = where;
  ++machine.waiting;
  pause(State::at_barrier);
}

void meet_warp(unsigned mask, void* deposit, Combine combine, const std::source_location& where) {
  Fiber& own = *machine.running;
  const unsigned lane = own.place.thread.x % kLanes, first = own.place.thread.x - lane;
  const unsigned lanes = std::min(kLanes, machine.threads - first);
  if (!(mask >> lane & 1u)) {
    fault(describe(own) + " is not in its own mask at " + describe(where));
  }
  own.mask = mask;
  own.deposit = deposit;
  own.combine = combine;
  own.where = where;
  own.state = State::in_warp;
  void* deposits[kLanes] = {};
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1u)) continue;
    if (i >= lanes) fault(describe(own) + " names a missing lane at " + describe(where));
    const Fiber& other = *machine.fibers[first + i];
    if (other.state != State::in_warp) {  // the last one to arrive goes on
      pause(State::in_warp);
      return;
    }
    if (other.mask != mask || other.combine != combine) {
      fault("divergent warp: " + describe(own) + " at " + describe(where) + ", " + describe(other) +
            " at " + describe(other.where));
    }
    deposits[i] = other.deposit;
  }
  combine(deposits, mask);
  for (unsigned i = 0; i < kLanes; ++i) {
    if (mask >> i & 1u) machine.fibers[first + i]->state = State::ready;
  }
}

void wait_until(bool (*ready)(const void*), const void* argument,
                const std::source_location& where) {
  if (ready(argument)) return;
  Fiber& fiber = *machine.running;
  fiber.is_ready = ready;
  fiber.argument = argument;
  fiber.where = where;
  pause(State::waiting);
}

void later(std::function<void()> work) { machine.pending.push_back(std::move(work)); }

uint64_t block_number() { return machine.blocks; }

void at_end_of_thread(void (*check)()) { machine.checks.push_back(check); }

void copy_later(void* target, const void* source, size_t bytes, size_t zero_filled) {
  // What the target held is lost from now on: another thread may still be reading it too late.
  std::memset(target, 0xff, bytes + zero_filled);
  machine.running->uncommitted.push_back({target, source, bytes, zero_filled});
}

void commit_copies() {
  Fiber& fiber = *machine.running;
  fiber.groups.push_back(std::move(fiber.uncommitted));
  fiber.uncommitted.clear();
}

void wait_copies(size_t groups_in_flight) {
  Fiber& fiber = *machine.running;
  while (fiber.groups.size() > groups_in_flight) {
    for (const Copy& copy : fiber.groups.front()) {
      std::memcpy(copy.target, copy.source, copy.bytes);
      std::memset(static_cast<std::byte*>(copy.target) + copy.bytes, 0, copy.zero_filled);
    }
    fiber.groups.pop_front();
  }
}

}  // namespace driftar::emulator

// --- for the tests, through ctypes
// -----------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) void driftar_emulator_order(int order) {
  driftar::emulator::machine.order = order;  // 0 forward, 1 reverse, 2 shuffled
}
