// The kernel: one cluster of blocks per row. Each block keeps its slice of the row in shared memory, so that the logits
// are read once and the gradient is written once:
//   1. copy the slice to shared memory, and sum it while the copies arrive (sweeps.h);
//   2. send the sums to all blocks of the cluster, and wait for theirs (exchange.h);
//   3. in each block one thread computes the row's statistics, loss and gradient terms: the same in all blocks;
//   4. write the gradient of the slice (sweeps.h).
#pragma once

#include "exchange.h"
#include "rows.h"
#include "sweeps.h"

namespace unirl::cuda {

inline __device__ Statistics<float> rounded(const Statistics<double>& at) {
  return {static_cast<float>(at.logp), static_cast<float>(at.entropy), static_cast<float>(at.lse)};
}

// Terms in fp32: exp and expm1 in double would take so many registers that only four blocks instead of five fit on a
// multiprocessor.
inline __device__ GradientTerms<float> terms_at(
    const Statistics<double>& at,
    const Coefficients<float>& d,
    const Readout<double>& readout,
    double top,
    double log_s,
    float x_target) {
  const Readout<float> narrow = {static_cast<float>(readout.gain), static_cast<float>(readout.kappa), readout.capped};
  return gradient_terms(rounded(at), d, narrow, static_cast<float>(top), static_cast<float>(log_s), x_target);
}

inline __device__ void set(const StatisticsColumns& out, int64_t row, const Statistics<float>& at) {
  out.logp[row] = at.logp;
  out.entropy[row] = at.entropy;
  out.lse[row] = at.lse;
}

// Address of a row's logits or gradients, from a column on.
template <class Format>
__device__ typename Format::Storage* start_of(const Matrix& matrix, const Rows& rows, int64_t row, int column) {
  const int64_t offset = row / rows.length * matrix.batch_stride + row % rows.length * matrix.token_stride + column;
  return static_cast<typename Format::Storage*>(matrix.data) + offset;
}

// Step is the code between the two sweeps of a row:
//   static constexpr bool READS    whether it needs the moments of the first sweep
//   static constexpr bool WRITES   whether it needs the second sweep
//   void prepare(row, exchange) const   called by all threads before the copies of the logits; its own copies arrive
//                                       with the first group
//   GradientTerms<float> operator()(row, leads, moments, target, exchange) const
//       called by one thread of each block; the one that leads writes the row's results
//   void absent(row, value) const  sets the results of a row that is not read
template <class Format, class Gradient, bool CAPPED, class Step>
__global__ void __launch_bounds__(THREADS, CAPPED ? CAPPED_BLOCKS_PER_SM : BLOCKS_PER_SM) cluster_rows(
    const __grid_constant__ Rows rows,
    const __grid_constant__ Matrix d_logits,
    const __grid_constant__ int width,
    const __grid_constant__ Step step) {
  typedef typename Format::Storage Storage;
  static_assert(sizeof(Exchange) + Slice<Format>::SLACK <= OTHER_MEMORY, "three blocks would not share a processor");
  extern __shared__ __align__(VECTOR_BYTES) unsigned char memory[];
  __shared__ Exchange exchange;
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
  const int row = blockIdx.x / blocks;
  const bool leads = rank == 0 && threadIdx.x == 0;
  const int begin = rank * width;
  const int n = max(0, min(width, static_cast<int>(rows.vocab) - begin));
  const int64_t y = rows.target[row];
  // All blocks of the cluster take the same branch, so that no block waits for one that has ended.
  if (!is_read(y, rows.vocab)) {
    const float value = y == rows.ignore ? 0.0f : NAN;
    if (leads) step.absent(row, value);
    if (Step::WRITES) fill<Gradient>(start_of<Gradient>(d_logits, rows, row, begin), n, value, -1, 0);
    return;
  }
  const int column = y == ELSEWHERE ? -1 : static_cast<int>(y);
  const int target = column < 0 ? -1 : column - begin;  // may be outside of this block's slice
  cluster_started();
  step.prepare(row, exchange);
  const Storage* const x = start_of<Format>(rows.logits, rows, row, begin);
  const Slice<Format> slice(memory, x, n);
  slice.copy(x);
  if (threadIdx.x == 0) {
    exchange.readout = make_readout(
        rows.scale, rows.softcap, rows.row_temperature == nullptr ? rows.temperature : rows.row_temperature[row]);
  }
  __syncthreads();
  const Map<CAPPED> map(exchange.readout);
  const Exponent exponent = make_exponent(exchange.readout.kappa);
  Moments<float> mine = no_moments();
  if (Step::READS) {
    mine = slice.shift == 0 ? sweep<true>(slice, map, exponent) : sweep<false>(slice, map, exponent);
  } else {
    wait_for_copies(0);
  }
  tell(exchange, slice, target, mine, exponent);
  if (threadIdx.x < WARP) {
    const Moments<double> moments = of_row(exchange, blocks, exponent);
    Target at = {0, -INFINITY};
    if (column >= 0) {
      at.x = exchange.parts[column / width].x_target;
      at.u = map.u(at.x);
    }
    __syncwarp();  // all lanes have read the parts: the program's results overwrite them
    if (threadIdx.x == 0) exchange.terms = step(row, leads, moments, at, exchange);
  }
  if (!Step::WRITES) return;
  __syncthreads();
  const GradientTerms<float> terms = exchange.terms;
  write_gradient<Gradient>(start_of<Gradient>(d_logits, rows, row, begin), slice, map, exponent, terms, target);
}

}  // namespace unirl::cuda
