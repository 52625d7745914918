// Matmuls on Haswell, Zen 1 and newer.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define UNIRL_ISA avx2_matmul
#define UNIRL_SIMD_BYTES 32
#include "panel_kernels.h"

namespace unirl::cpu {
const PanelKernels avx2_panels = avx2_matmul::panels;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
