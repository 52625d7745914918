// Skylake-X, Zen 4 and newer: 16 floats to a vector.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define UNIRL_ISA avx512
#define UNIRL_SIMD_BYTES 64
#include "segment_kernels.h"

namespace unirl::cpu {
const SegmentKernels* const avx512_kernels = avx512::kernels;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
