// Matmuls on Skylake-X, Zen 4 and newer.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define UNIRL_ISA avx512_fp32_matmul
#define UNIRL_SIMD_BYTES 64
#include "panel_kernels.h"

namespace unirl::cpu {
const PanelKernels avx512_panels = avx512_fp32_matmul::panels;
const WidePacking avx512_packing = avx512_fp32_matmul::wide_packing;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
