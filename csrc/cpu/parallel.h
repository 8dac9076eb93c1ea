#pragma once

#include <algorithm>
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

// Calls body(begin, end) on pieces of [0, count) of about `piece` items each, in parallel; every
// thread gets equally many. A single piece runs in the calling thread: choose pieces large enough
// to pay for waking the others.
template <typename Body>
void for_each_piece(int64_t count, int64_t piece, const Body& body) {
  const int64_t threads = thread_count();
  int64_t tasks = (count + piece - 1) / piece;
  if (tasks > threads) tasks = std::min((tasks + threads - 1) / threads * threads, count);
  parallel_for(tasks, [&](int64_t task, int64_t) {
    body(count * task / tasks, count * (task + 1) / tasks);
  });
}

}  // namespace driftar::cpu
