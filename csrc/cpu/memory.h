// Memory for gradients: on huge pages, and kept for the next step.
#pragma once

#include <stddef.h>

namespace unirl::cpu {

struct Block {
  void* memory;
  size_t bytes;
};

// Uninitialised memory of at least this many bytes: the smallest kept block that is large enough, whatever its size. If
// there is none, all kept blocks are freed and new memory is allocated. Throws std::bad_alloc.
Block allocate(size_t bytes);

// Keeps a block for reuse. Frees the oldest kept blocks while more than the limit is kept.
void release(const Block& block);

// Sets how many bytes are kept at most, and frees the rest. 0 before the first call.
void limit_kept_bytes(size_t bytes);

size_t kept_bytes();

}  // namespace unirl::cpu
