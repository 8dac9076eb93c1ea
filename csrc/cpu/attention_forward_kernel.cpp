#include "attention_forward_block.h"

namespace driftar::cpu {

namespace {

template <typename scalar_t>
QueryBlock<scalar_t> block_of_task(const AttentionForward<scalar_t>& call, int64_t task) {
  const QueryBlocking& blocking = call.blocking;
  const int64_t group = call.query_heads / call.key_heads;
  const int64_t row = task % blocking.row_blocks * blocking.rows;
  task /= blocking.row_blocks;
  const int64_t head_in_group = task % blocking.head_blocks * blocking.heads;
  task /= blocking.head_blocks;
  const int64_t key_head = task % call.key_heads, b = task / call.key_heads;
  return {call,
          b,
          key_head * group + head_in_group,
          std::min(blocking.heads, group - head_in_group),
          row,
          std::min(blocking.rows, call.query_length - row)};
}

}  // namespace

template <Isa isa, typename scalar_t>
void AttentionKernel<isa, scalar_t>::forward(const AttentionForward<scalar_t>& call, int64_t task,
                                             acc_t* memory) {
  const int64_t tasks = forward_tasks(call, call.blocking);
  const QueryBlock<scalar_t> next = block_of_task(call, std::min(task + 1, tasks - 1));
  forward_block(call, block_of_task(call, task), task + 1 < tasks ? &next : nullptr, memory);
}

}  // namespace driftar::cpu

#include "attention_instances.h"
