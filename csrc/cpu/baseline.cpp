// Every machine: 4 floats to a vector (SSE2, NEON).
#define UNIRL_ISA baseline
#define UNIRL_SIMD_BYTES 16
#include "segment_kernels.h"

namespace unirl::cpu {
const SegmentKernels* const baseline_kernels = baseline::kernels;
}
