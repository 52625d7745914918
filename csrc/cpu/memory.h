// Memory for gradients: on huge pages, and kept for the next step.
#pragma once

#include <stddef.h>

namespace unirl::cpu {

struct Block {
  void* memory;
  size_t bytes;
};

// Uninitialised memory of at least so many bytes: the smallest kept block that is large enough; else all that is kept
// goes back to the system, and new memory is taken. Throws std::bad_alloc.
Block allocate(size_t bytes);

// Keeps a block for reuse, and gives back the longest kept while more than the limit is kept.
void release(const Block& block);

// Most bytes to keep; what is kept beyond goes back at once. 0 before the first call.
void limit_kept_bytes(size_t bytes);

size_t kept_bytes();

}  // namespace unirl::cpu
