#include "memory.h"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <mutex>
#include <new>
#include <vector>

namespace unirl::cpu {
namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;

struct Block {
  void* memory;
  size_t bytes;
};

struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;  // the longest kept first
  size_t bytes = 0;
  size_t limit = SIZE_MAX;
};

// Never destroyed: tensors may be freed after the destructors of this library have run.
Kept& kept() {
  static Kept* const instance = new Kept;
  return *instance;
}

size_t rounded_up(size_t bytes) { return (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE; }

void trim(Kept& all, size_t limit) {
  while (all.bytes > limit) {
    free(all.blocks.front().memory);
    all.bytes -= all.blocks.front().bytes;
    all.blocks.erase(all.blocks.begin());
  }
}

}  // namespace

void* allocate(size_t bytes) {
  const size_t size = rounded_up(bytes);
  Kept& all = kept();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (auto block = all.blocks.rbegin(); block != all.blocks.rend(); ++block) {
      if (block->bytes != size) continue;
      void* const memory = block->memory;
      all.blocks.erase(std::next(block).base());
      all.bytes -= size;
      return memory;
    }
  }
  void* const memory = aligned_alloc(HUGE_PAGE, size);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(memory, size, MADV_HUGEPAGE);
#endif
  return memory;
}

void release(void* memory, size_t bytes) {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.blocks.push_back({memory, rounded_up(bytes)});
  all.bytes += rounded_up(bytes);
  trim(all, all.limit);
}

void limit_kept_bytes(size_t bytes) {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.limit = bytes;
  trim(all, bytes);
}

size_t kept_bytes() {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.bytes;
}

}  // namespace unirl::cpu
