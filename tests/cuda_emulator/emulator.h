#pragma once

// A SIMT machine on one CPU core, on which the CUDA sources run as plain C++. Every thread of a
// block is a fiber; a fiber runs until it waits for others, so that memory written by another
// thread is visible only after a barrier, and the order in which fibers run is shuffled. Faults end
// the launch with a message: divergent or missing partners of a barrier or a warp operation, and
// accesses outside of shared memory or of a guarded tensor. Shared memory starts as NaN.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

namespace driftar::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// The running thread and its block.
struct Place {
  Index thread, block, block_size, grid_size;
};

const Place& place();

// Dynamic shared memory of the running block.
std::byte* shared_memory();

// Runs body(argument) once for every thread. Returns false after a fault.
bool launch(Index grid, Index block, size_t shared_bytes, void (*body)(const void*),
            const void* argument);

// Of the device, e.g. 80: DRIFTAR_CUDA_EMULATED_CAPABILITY, by default 80.
int capability();

// What ended the last faulty launch.
const char* fault_message();

// Ends the launch.
[[noreturn]] void fault(const std::string& message);

// All threads of the block meet.
void block_barrier(const std::source_location& where);

// The lanes of `mask` meet: combine(deposits, mask) runs once, with the deposit of lane i at
// deposits[i], and answers through them.
using Combine = void (*)(void* const* deposits, unsigned mask);
void meet_warp(unsigned mask, void* deposit, Combine combine, const std::source_location& where);

// Suspends the running thread until ready(argument).
void wait_until(bool (*ready)(const void*), const void* argument,
                const std::source_location& where);

// What another unit of the machine does: at the latest, when no thread can go on without it.
void later(std::function<void()> work);

// Counts the blocks that have run; `check` is called at the end of every thread.
uint64_t block_number();
void at_end_of_thread(void (*check)());

// Asynchronous copies take place when they are waited for, not before.
void copy_later(void* target, const void* source, size_t bytes, size_t zero_filled);
void commit_copies();
void wait_copies(size_t groups_in_flight);

}  // namespace driftar::emulator
