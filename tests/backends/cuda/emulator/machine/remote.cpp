// Shared memory of other blocks. A thread works on a view of its own: it sees there what others had released when it
// last acquired, and what it writes is seen by others once it releases it, or at its end.
#include <algorithm>

#include "operations.h"

namespace emulator {

unsigned char* in_block(const void* own, int rank) {
  Thread& thread = machine.running();
  const int blocks = static_cast<int>(machine.launch().cluster);
  if (rank < 0 || rank >= blocks) {
    machine.fail("no block of rank " + std::to_string(rank) + " in a cluster of " + std::to_string(blocks));
  }
  unsigned char* const memory = thread.block->memory;
  const size_t offset = static_cast<const unsigned char*>(own) - memory;
  const Variable variable = machine.variable_at(offset);
  if (rank == thread.block->rank) return memory + offset;
  for (View& view : thread.views) {
    if (view.rank == rank && view.offset == variable.offset) return view.now.data() + (offset - view.offset);
  }
  const unsigned char* const there = machine.block(rank).memory + variable.offset;
  const std::vector<unsigned char> bytes(there, there + variable.bytes);
  thread.views.push_back({rank, variable.offset, bytes, bytes});
  return thread.views.back().now.data() + (offset - variable.offset);
}

void release(Thread& thread) {
  for (View& view : thread.views) {
    unsigned char* const there = machine.block(view.rank).memory + view.offset;
    for (size_t i = 0; i < view.now.size(); ++i) {
      if (view.now[i] != view.before[i]) there[i] = view.now[i];
    }
    view.before = view.now;
  }
}

// What the thread has written and not released stays its own.
void acquire(Thread& thread) {
  for (View& view : thread.views) {
    const unsigned char* const there = machine.block(view.rank).memory + view.offset;
    for (size_t i = 0; i < view.now.size(); ++i) {
      if (view.now[i] == view.before[i]) view.now[i] = there[i];
      view.before[i] = there[i];
    }
  }
}

}  // namespace emulator
