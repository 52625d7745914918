// What an instruction set provides: the two sweeps over a segment of a row, for each format of the logits.
#pragma once

#include <stdint.h>

#include "../row_math.h"

namespace unirl::cpu {

// Logits per segment. Rows are always cut at its multiples and the parts merged in order, so that a row's bits depend
// on nothing else. 32 KiB of fp32 stay in the first-level cache between the search for the maximum and the sums; with
// half the size statistics take a tenth longer, twice the size gains nothing (benchmarks/NOTES.md).
constexpr int64_t SEGMENT = 8192;

// Logits that kernels take at a time, on any instruction set, divide it.
constexpr int64_t MOST_STEP = 64;

struct SegmentKernels {
  // Moments of n logits at x.
  Moments<double> (*moments)(const void* x, int64_t n, const Readout<double>& readout);
  // The same and what else is observed of them; at is 0: it counts from x.
  Observed<double> (*observe)(const void* x, int64_t n, const Readout<double>& readout);
  // The first of n logits at x that is top, as in Observed; n where none is.
  int64_t (*find)(const void* x, int64_t n, double top, const Readout<double>& readout);
  // Gradient of n logits at x, into d_x: other memory, or x itself.
  void (*gradient)(
      const void* x, void* d_x, int64_t n, const Readout<double>& readout, const GradientTerms<double>& terms);
  // Moments, and e^(kappa (u_j - m)) of each logit into e, in an order of the kernels' own; m counts as 0 where it is
  // -inf. Without a softcap. e has room for n, rounded up to a multiple of MOST_STEP; of FP32 logits for n, and may be
  // x itself. Null for FP64.
  Moments<double> (*exponentials)(const void* x, int64_t n, const Readout<double>& readout, float* e);
  // d_x_j = factor e_j; d_x is other memory, or e itself. streams: past the caches, into other memory.
  void (*scale)(const float* e, void* d_x, int64_t n, double factor, bool streams);
  double (*read)(const void* x);
  // u of one logit, with the rounding of the sweeps: so that a target which is the maximum has u = m.
  double (*u)(const void* x, const Readout<double>& readout);
  void (*write)(void* x, double value);
  int64_t bytes;  // of a logit
};

enum class Format : int { FP32, BF16, FP16, FP64 };

// By instruction set, those of FP32, BF16, FP16.
extern const SegmentKernels* const avx512_kernels;
extern const SegmentKernels* const avx2_kernels;
extern const SegmentKernels* const baseline_kernels;

// FP64 is for gradcheck and the oracle: plain double arithmetic on any machine.
extern const SegmentKernels fp64_kernels;

}  // namespace unirl::cpu
