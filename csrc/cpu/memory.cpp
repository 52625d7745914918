#include "memory.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <mutex>
#include <new>
#include <vector>

namespace unirl::cpu {
namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;

struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;  // the oldest first
  size_t bytes = 0;
  size_t limit = 0;
};

// Never destroyed, since tensors may be freed after the destructors of this library have run.
Kept& kept() {
  static Kept* const instance = new Kept;
  return *instance;
}

void give_back(Kept& all, size_t limit) {
  while (all.bytes > limit) {
    free(all.blocks.front().memory);
    all.bytes -= all.blocks.front().bytes;
    all.blocks.erase(all.blocks.begin());
  }
}

// A kept block, or a block with a null pointer.
Block reuse(size_t bytes) {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  auto best = all.blocks.end();
  for (auto block = all.blocks.begin(); block != all.blocks.end(); ++block) {
    if (block->bytes >= bytes && (best == all.blocks.end() || block->bytes < best->bytes)) best = block;
  }
  if (best == all.blocks.end()) {
    give_back(all, 0);
    return {nullptr, 0};
  }
  const Block block = *best;
  all.blocks.erase(best);
  all.bytes -= block.bytes;
  return block;
}

}  // namespace

Block allocate(size_t bytes) {
  const size_t size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const Block block = reuse(size);
  if (block.memory != nullptr) return block;
  void* const memory = aligned_alloc(HUGE_PAGE, size);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(memory, size, MADV_HUGEPAGE);
#endif
  return {memory, size};
}

void release(const Block& block) {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.blocks.push_back(block);
  all.bytes += block.bytes;
  give_back(all, all.limit);
}

void limit_kept_bytes(size_t bytes) {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.limit = bytes;
  give_back(all, bytes);
}

size_t kept_bytes() {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.bytes;
}

}  // namespace unirl::cpu
