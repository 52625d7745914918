// Matmuls of bf16 on Cooper Lake, Zen 4 and newer.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define UNIRL_ISA avx512_bf16_matmul
#define UNIRL_SIMD_BYTES 64
#define UNIRL_BF16_DOT
#include "panel_kernels.h"

namespace unirl::cpu {
const PanelKernels avx512_bf16_panels = avx512_bf16_matmul::panels;
const WidePacking avx512_bf16_packing = avx512_bf16_matmul::wide_packing;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
