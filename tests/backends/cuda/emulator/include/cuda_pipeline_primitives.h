#pragma once

#include "machine/operations.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulator::start_copy(to, from, bytes);
}

inline void __pipeline_commit() { emulator::commit_copies(); }

// Until at most `pending` groups are under way.
inline void __pipeline_wait_prior(size_t pending) { emulator::wait_for_copies(pending); }
