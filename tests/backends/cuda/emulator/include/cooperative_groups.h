#pragma once

#include "machine/operations.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return emulator::machine.launch().cluster; }
  unsigned block_rank() const { return static_cast<unsigned>(emulator::machine.running().block->rank); }

  template <class T>
  T* map_shared_rank(T* own, int rank) const {
    return reinterpret_cast<T*>(emulator::in_block(own, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
