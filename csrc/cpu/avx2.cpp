// Haswell, Zen 1 and newer: 8 floats to a vector.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define UNIRL_ISA avx2
#define UNIRL_SIMD_BYTES 32
#include "segment_kernels.h"

namespace unirl::cpu {
const SegmentKernels* const avx2_kernels = avx2::kernels;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
