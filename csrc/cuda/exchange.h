// The exchange between the blocks of a row, through distributed shared memory.
#pragma once

#include <cooperative_groups.h>

#include "../program.h"
#include "partial_sums.h"
#include "slice.h"

namespace unirl::cuda {

constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The target's logit x, and its u (see row_math.h): -inf if another shard holds the target, so that its probability is
// 0.
struct Target {
  float x, u;
};

// What a block sends to the others: the sums of its slice.
struct Part {
  double s, sz;
  float m;
  float x_target;  // valid if the target is in its slice
};

// Shared memory of a block besides its slice. The program's results reuse the memory of the parts, after these have
// been combined.
struct Exchange {
  union {
    struct {
      Part parts[MAX_CLUSTER];
      Moments<double> warps[WARPS];
    };
    float results[MAX_LIVE];
  };
  Readout<double> readout;
  GradientTerms<float> terms;
  float inputs[FIRST_PARAM];  // the program's statistics and fields
  float outputs[N_OUTPUTS];
};

// Signals only that this block has started. It is relaxed: a release would wait for all earlier memory accesses.
inline __device__ void cluster_started() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
inline __device__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
inline __device__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Combines the parts of WIDTH lanes; every lane gets the result. The order is always the same.
template <int WIDTH>
__device__ Moments<double> combine(const Moments<double>& mine, const Exponent& exponent) {
  float m = static_cast<float>(mine.m);
  for (int step = WIDTH / 2; step > 0; step /= 2) m = max_or_nan(m, __shfl_xor_sync(ALL_LANES, m, step));
  Moments<double> sum = relative_to(m, mine, exponent);
  for (int step = WIDTH / 2; step > 0; step /= 2) {
    sum.s += __shfl_xor_sync(ALL_LANES, sum.s, step);
    sum.sz += __shfl_xor_sync(ALL_LANES, sum.sz, step);
  }
  return sum;
}

// Sends this block's part to all blocks of the cluster, and waits for theirs. All threads of the block call it.
template <class Format>
__device__ void tell(
    Exchange& exchange, const Slice<Format>& slice, int target, Moments<float> mine, const Exponent& exponent) {
  const auto cluster = cooperative_groups::this_cluster();
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const Moments<double> of_warp = combine<WARP>(widen(mine), exponent);
  if (lane == 0) exchange.warps[warp] = of_warp;
  __syncthreads();
  cluster_wait();  // all blocks have started, so their shared memory may be written
  if (warp == 0) {
    const Moments<double> of_block = combine<WARPS>(exchange.warps[lane % WARPS], exponent);
    Part part{of_block.s, of_block.sz, static_cast<float>(of_block.m), 0};
    if (target >= 0 && target < slice.n) part.x_target = slice[target];
    if (lane < cluster.num_blocks()) {
      *cluster.map_shared_rank(&exchange.parts[cluster.block_rank()], lane) = part;
    }
  }
  __syncwarp();
  // After this no block accesses another's memory, so a block may end at any time.
  cluster_arrive();
  cluster_wait();
}

// Moments of the row, from the parts of all blocks. All lanes of a warp call it.
inline __device__ Moments<double> of_row(const Exchange& exchange, int blocks, const Exponent& exponent) {
  const int rank = threadIdx.x % MAX_CLUSTER;
  Moments<double> of_block = widen(no_moments());
  if (rank < blocks) {
    const Part& part = exchange.parts[rank];
    of_block = {part.m, part.s, part.sz};
  }
  return combine<MAX_CLUSTER>(of_block, exponent);
}

}  // namespace unirl::cuda
