// Memory for gradients: aligned to huge pages, and kept for the next step.
#pragma once

#include <stddef.h>

namespace unirl::cpu {

// Uninitialised memory. Throws std::bad_alloc.
void* allocate(size_t bytes);

// Gives memory of allocate(bytes) back: kept for reuse while what is kept stays within the limit.
void release(void* memory, size_t bytes);

// Returns what is kept to the system, down to the given number of bytes, and keeps no more from now on.
void limit_kept_bytes(size_t bytes);

size_t kept_bytes();

}  // namespace unirl::cpu
