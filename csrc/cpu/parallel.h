#pragma once

#include <cstdint>
#include <functional>

namespace driftar::cpu {

// Number of threads that parallel_for uses, which is also the number of scratch slots it needs.
int64_t thread_count();

// Runs body(task, slot) for every task in [0, tasks); slot < thread_count() is owned by one thread
// at a time. Tasks are dealt out in contiguous ranges, the same for every call with the same thread
// count.
//
// A process forked after threads were used has lost them, and would wait for ever for their work.
// The first call in such a child therefore sets PyTorch to one thread.
void parallel_for(int64_t tasks, const std::function<void(int64_t task, int64_t slot)>& body);

}  // namespace driftar::cpu
