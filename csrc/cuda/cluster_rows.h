// One row by one cluster of blocks: each keeps its slice in shared memory between the two sweeps, so that the logits
// are read once and the gradient is written once.
//
// A block sums its slice while it arrives, tells all blocks of the cluster, and after one cluster barrier knows the row
// as well as they do: each runs the scalar part again, by one thread, and writes its slice of the gradient.
#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "partial_sums.h"
#include "rows.h"
#include "slice.h"

namespace unirl::cuda {

constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The target's logit, raw and mapped (see row_math.h). Of a target that is elsewhere, probability 0.
struct Target {
  float x, u;
};

// What a block tells the others.
struct Part {
  double s, sz;
  float m;
  float x_target;  // where the target is in its slice
};

// Shared memory of a block besides its slice. The program's results come when the parts have been combined.
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

// Says that this block has started, and nothing of its memory: a release would wait for all earlier accesses.
inline __device__ void cluster_started() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
inline __device__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
inline __device__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// u and du/dv of a logit.
template <bool CAPPED>
struct Map {
  Readout<float> readout;

  __device__ explicit Map(const Readout<double>& of)
      : readout{static_cast<float>(of.gain), static_cast<float>(of.kappa), CAPPED} {}
  __device__ float u(float x) const { return to_u(readout, x); }
  // u - reference; exactly 0 for the logit that is the reference.
  __device__ float difference(float x, float reference) const {
    return CAPPED ? u(x) - reference : fmaf(readout.gain, x, -reference);
  }
  __device__ float slope(float x) const {
    if (!CAPPED) return 1;
    // As in row_math.h, with the exponential and the division of the hardware.
    const float w = fast_exp2(static_cast<float>(-2 * LOG2E) * fabsf(readout.gain * x));
    return __fdividef(4 * w, (1 + w) * (1 + w));
  }
};

// Sums of WIDTH lanes' parts, in all lanes; always in the same order.
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

// The largest u of a thread's logits: that of their largest x, or of their smallest one under a negative gain. Vectors
// are looked at as they land.
template <bool CAPPED, bool NEGATED, bool ALIGNED, class Format>
__device__ float largest(const Slice<Format>& slice, const Map<CAPPED>& map) {
  constexpr int N = Format::N;
  typedef Extreme<Format, NEGATED> Extreme;
  typename Extreme::Type found = Extreme::none();
  int i = threadIdx.x;
#pragma unroll 1
  for (int group = 0; group < COPY_GROUPS; ++group) {
    wait_for_copies(COPY_GROUPS - 1 - group);
    __syncthreads();
    for (const int end = slice.vectors_after(group); i < end; i += THREADS) {
      found = Extreme::of(found, slice.template vector<ALIGNED>(i * N));
    }
  }
  float x = Extreme::reduced(found);
  // The logits of the row's last vector that is not whole go to the thread whose vector it is.
  if (i == slice.n / N) {
    for (int k = i * N; k < slice.n; ++k) x = NEGATED ? -max_or_nan(-x, -slice[k]) : max_or_nan(x, slice[k]);
  }
  return map.u(x);
}

// A thread's sums relative to m, its own largest u. CLAMPED: see Exponent.
template <bool CLAMPED, bool ALIGNED, bool CAPPED, class Format>
__device__ Moments<float> sums(
    const Slice<Format>& slice, const Map<CAPPED>& map, const Exponent& exponent, float m) {
  constexpr int N = Format::N;
  const float reference = finite_reference(m);
  Moments<float> at = {m, 0, 0};
  int i = threadIdx.x;
  const auto take = [&](float x) {
    float d = map.difference(x, reference);
    if (CLAMPED) d = max_or_nan(d, exponent.floor);
    const float e = fast_exp2(exponent.rate * d);
    at.s += e;
    at.sz += e * d;
  };
#pragma unroll 2
  for (const int end = slice.n / N; i < end; i += THREADS) {
    float x[N];
    Format::unpack(slice.template vector<ALIGNED>(i * N), x);
    for (float one : x) take(one);
  }
  if (i == slice.n / N) {
    for (int k = i * N; k < slice.n; ++k) take(slice[k]);
  }
  return at;
}

template <bool ALIGNED, bool CAPPED, class Format>
__device__ Moments<float> sweep(const Slice<Format>& slice, const Map<CAPPED>& map, const Exponent& exponent) {
  const float m = map.readout.gain < 0 ? largest<CAPPED, true, ALIGNED>(slice, map)
                                       : largest<CAPPED, false, ALIGNED>(slice, map);
  const Moments<float> at = sums<false, ALIGNED>(slice, map, exponent, m);
  // Differences of -inf are rare, and 0 times -inf is NaN. Where it is another NaN, it stays.
  return at.sz == at.sz ? at : sums<true, ALIGNED>(slice, map, exponent, m);
}

// Tells all blocks of the cluster this block's part. Warps have to be in step; warp 0 returns after the barrier.
template <class Format>
__device__ void tell(
    Exchange& exchange, const Slice<Format>& slice, int target, Moments<float> mine, const Exponent& exponent) {
  const auto cluster = cooperative_groups::this_cluster();
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const Moments<double> of_warp = combine<WARP>(widen(mine), exponent);
  if (lane == 0) exchange.warps[warp] = of_warp;
  __syncthreads();
  cluster_wait();  // for all to have started: their memory may now be written
  if (warp == 0) {
    const Moments<double> of_block = combine<WARPS>(exchange.warps[lane % WARPS], exponent);
    Part part{of_block.s, of_block.sz, static_cast<float>(of_block.m), 0};
    if (target >= 0 && target < slice.n) part.x_target = slice[target];
    if (lane < cluster.num_blocks()) {
      *cluster.map_shared_rank(&exchange.parts[cluster.block_rank()], lane) = part;
    }
  }
  __syncwarp();
  // From here on no block touches another's memory, so that it may end whenever it likes.
  cluster_arrive();
  cluster_wait();
}

// Moments of the row, from what all blocks told. For all lanes of a warp.
inline __device__ Moments<double> of_row(const Exchange& exchange, int blocks, const Exponent& exponent) {
  const int rank = threadIdx.x % MAX_CLUSTER;
  Moments<double> of_block = widen(no_moments());
  if (rank < blocks) {
    const Part& part = exchange.parts[rank];
    of_block = {part.m, part.s, part.sz};
  }
  return combine<MAX_CLUSTER>(of_block, exponent);
}

inline __device__ Statistics<float> rounded(const Statistics<double>& at) {
  return {static_cast<float>(at.logp), static_cast<float>(at.entropy), static_cast<float>(at.lse)};
}

// Terms in fp32, for the double functions would cost a block in five its registers.
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

template <class Format>
__device__ typename Format::Storage* start_of(const Matrix& matrix, const Rows& rows, int64_t row, int column) {
  const int64_t offset = row / rows.length * matrix.batch_stride + row % rows.length * matrix.token_stride + column;
  return static_cast<typename Format::Storage*>(matrix.data) + offset;
}

// A slice of the gradient that is the same in all columns but the target's.
template <class Gradient>
__device__ void fill(typename Gradient::Storage* d_x, int n, float value, int target, float at_target) {
  store<Gradient>(d_x, n, [=](int k, auto& of) {
    constexpr int N = sizeof of / sizeof *of;
    for (int i = 0; i < N; ++i) of[i] = target == k + i ? at_target : value;
  });
}

// A slice of the gradient. LINEAR: whether it has a part that is linear in log p. ALIGNED: whether logits are aligned
// where their gradients are.
template <bool LINEAR, bool ALIGNED, class Gradient, class Format, bool CAPPED>
__device__ void write(
    typename Gradient::Storage* d_x,
    const Slice<Format>& slice,
    const Map<CAPPED>& map,
    const Exponent& exponent,
    const GradientTerms<float>& terms,
    int target) {
  store<Gradient>(d_x, slice.n, [&](int k, auto& of) {
    constexpr int N = sizeof of / sizeof *of;
    if constexpr (N == 1) {
      of[0] = slice[k];
    } else {
      for (int i = 0; i < N; i += Format::N) {
        Format::unpack(slice.template vector<ALIGNED>(k + i), reinterpret_cast<float(&)[Format::N]>(of[i]));
      }
    }
    for (float& x : of) {
      float d = map.difference(x, terms.reference);
      if (LINEAR) d = max_or_nan(d, exponent.floor);
      const float e = fast_exp2(exponent.rate * d) * (LINEAR ? d * terms.linear + terms.constant : terms.constant);
      x = CAPPED ? e * map.slope(x) : e;
    }
    if (static_cast<unsigned>(target - k) < N) {
      for (int i = 0; i < N; ++i) of[i] = target == k + i ? terms.target : of[i];
    }
  });
}

// A Step is what stands between the two sweeps of a row:
//   static constexpr bool READS    whether it wants the first sweep's moments
//   static constexpr bool WRITES   whether its terms are for the second sweep
//   void prepare(row, exchange) const   by all threads, before the copies of the logits: its own land with the first
//   GradientTerms<float> operator()(row, leads, moments, target, exchange) const
//       by one thread of each block; the one that leads returns the row's values
//   void absent(row, value) const  what a row returns that is not read
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
  // All blocks of the cluster take the same branch, so that none waits for a block that has ended.
  if (!is_read(y, rows.vocab)) {
    const float value = y == rows.ignore ? 0.0f : NAN;
    if (leads) step.absent(row, value);
    if (Step::WRITES) fill<Gradient>(start_of<Gradient>(d_logits, rows, row, begin), n, value, -1, 0);
    return;
  }
  const int column = y == ELSEWHERE ? -1 : static_cast<int>(y);
  const int target = column < 0 ? -1 : column - begin;  // in this block's slice, or not
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
    __syncwarp();  // for all lanes to have read the parts: the program's results lie there
    if (threadIdx.x == 0) exchange.terms = step(row, leads, moments, at, exchange);
  }
  if (!Step::WRITES) return;
  __syncthreads();
  const GradientTerms<float> terms = exchange.terms;
  auto* const d_x = start_of<Gradient>(d_logits, rows, row, begin);
  if (terms.constant == 0 && terms.linear == 0) {
    fill<Gradient>(d_x, n, 0, target, terms.target);
    return;
  }
  const bool aligned = slice.aligned(head_of<Gradient>(d_x, n));
  const auto to = [&](auto linear, auto same) {
    write<decltype(linear)::value, decltype(same)::value, Gradient>(d_x, slice, map, exponent, terms, target);
  };
  typedef std::true_type Yes;
  typedef std::false_type No;
  if (terms.linear == 0) {
    aligned ? to(No(), Yes()) : to(No(), No());
  } else {
    aligned ? to(Yes(), Yes()) : to(Yes(), No());
  }
}

// Lets a kernel have the memory that it may ask for, the same for every V: threads that launch it for different ones must
// not lower each other's limit.
template <class Kernel>
cudaError_t allow(Kernel kernel, int bytes, int cluster) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && cluster > PORTABLE_CLUSTER) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

// The kernel's launch; what went wrong, empty if nothing did.
template <class Format, class Gradient, bool CAPPED, class Step>
std::string launch(const Rows& rows, const Matrix& d_logits, const Step& step, cudaStream_t stream) {
  const int64_t n_rows = rows.batch * rows.length, bytes = sizeof(typename Format::Storage);
  const Geometry cut = geometry(rows.vocab, bytes);
  if (cut.cluster == 0) {
    return "kernel 'cluster' keeps a row in the shared memory of " + std::to_string(MAX_CLUSTER) +
           " blocks: logits of this dtype must have V <= " + std::to_string(max_vocab(bytes)) + ", got " +
           std::to_string(rows.vocab) + "; Plan(backend='triton') takes any V";
  }
  if (n_rows == 0) return "";
  if (n_rows * cut.cluster > INT32_MAX) {
    return "kernel 'cluster' takes at most " + std::to_string(INT32_MAX / cut.cluster) + " rows of this V, got " +
           std::to_string(n_rows);
  }
  const auto kernel = cluster_rows<Format, Gradient, CAPPED, Step>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(n_rows * cut.cluster));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = cut.width * bytes + Slice<Format>::SLACK;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cut.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaError_t error = allow(kernel, MAX_SLICE + Slice<Format>::SLACK, cut.cluster);
  if (error == cudaSuccess && cut.cluster > PORTABLE_CLUSTER) {
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error == cudaSuccess && clusters == 0) {
      return "kernel 'cluster' needs " + std::to_string(cut.cluster) + " blocks at once for rows of " +
             std::to_string(rows.vocab) + " logits, and no part of this device runs so many; " +
             "Plan(backend='triton') takes any V";
    }
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, rows, d_logits, cut.width, step);
  return error == cudaSuccess ? "" : failure("cluster", error);
}

template <class Step>
std::string launch(const Rows& rows, const Matrix& d_logits, const Step& step, cudaStream_t stream) {
  const bool capped = rows.softcap > 0;
  const auto run = [&](auto format, auto gradient) {
    typedef decltype(format) F;
    typedef decltype(gradient) G;
    return capped ? launch<F, G, true>(rows, d_logits, step, stream)
                  : launch<F, G, false>(rows, d_logits, step, stream);
  };
  if constexpr (Step::WRITES) {
    if (rows.logits.format == Format::FP32 && d_logits.format == Format::BF16) return run(Float32(), BFloat16());
  }
  switch (rows.logits.format) {
    case Format::FP32: return run(Float32(), Float32());
    case Format::BF16: return run(BFloat16(), BFloat16());
    case Format::FP16: return run(Float16(), Float16());
  }
  return "unknown format of logits";
}

}  // namespace unirl::cuda
