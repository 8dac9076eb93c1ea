#include "parallel.h"

#include <ATen/Parallel.h>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <atomic>

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "compile this file with OpenMP, or at::parallel_for runs on one thread"
#endif

namespace driftar::cpu {

namespace {

std::atomic<bool> forked{false};

#if !defined(_WIN32)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif

void settle_after_fork() {
  if (forked.exchange(false)) at::set_num_threads(1);
}

}  // namespace

int64_t thread_count() {
  settle_after_fork();
  return at::get_num_threads();
}

void parallel_for(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  settle_after_fork();
  at::parallel_for(0, tasks, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    const int64_t slot = at::get_thread_num();
    for (int64_t task = begin; task < end; ++task) body(task, slot);
  });
}

}  // namespace driftar::cpu
