// The functions of an instruction set: the two sweeps over a segment of a row, for each format of the logits.
#pragma once

#include <stdint.h>

#include "../row_math.h"

namespace unirl::cpu {

// Logits per segment. Rows are always cut at multiples of it and the parts are merged in order, so that the bits of a
// row depend on nothing else. A segment of 32 KiB in fp32 stays in the L1 cache between the search for the maximum and
// the sums. With half the size statistics take a tenth longer; twice the size gains nothing (benchmarks/NOTES.md).
constexpr int64_t SEGMENT = 8192;

// A multiple of the number of logits that kernels process at a time, on any instruction set.
constexpr int64_t MOST_STEP = 64;

struct SegmentKernels {
  // Moments of n logits at x.
  Moments<double> (*moments)(const void* x, int64_t n, const Readout<double>& readout);
  // Moments and observations of n logits at x; at is set to 0.
  Observed<double> (*observe)(const void* x, int64_t n, const Readout<double>& readout);
  // Index of the first of n logits at x that equals top of Observed; n if there is none.
  int64_t (*find)(const void* x, int64_t n, double top, const Readout<double>& readout);
  // Gradient of n logits at x, written to d_x: other memory, or x itself.
  void (*gradient)(
      const void* x, void* d_x, int64_t n, const Readout<double>& readout, const GradientTerms<double>& terms);
  // Moments, and e^(kappa (u_j - m)) of each logit, written to e in the order of the kernel; m is taken as 0 if it is
  // -inf. Only without a softcap. e has room for n rounded up to a multiple of MOST_STEP. For FP32 it has room for n,
  // and may be x itself. Null for FP64.
  Moments<double> (*exponentials)(const void* x, int64_t n, const Readout<double>& readout, float* e);
  // d_x_j = factor e_j; d_x is other memory, or e itself. streams: writes past the caches, to other memory.
  void (*scale)(const float* e, void* d_x, int64_t n, double factor, bool streams);
  double (*read)(const void* x);
  // u of one logit, with the rounding of the sweeps, so that u = m if the target is the maximum.
  double (*u)(const void* x, const Readout<double>& readout);
  void (*write)(void* x, double value);
  int64_t bytes;  // of a logit
};

enum class Format : int { FP32, BF16, FP16, FP64 };

// The kernels of each instruction set, for FP32, BF16, FP16.
extern const SegmentKernels* const avx512_kernels;
extern const SegmentKernels* const avx2_kernels;
extern const SegmentKernels* const baseline_kernels;

// Plain double arithmetic for any machine, for gradcheck and the oracle.
extern const SegmentKernels fp64_kernels;

}  // namespace unirl::cpu
