// Matmul by the brgemm of the loaded torch (oneDNN; at::native::cpublas::brgemm in ATen/native/CPUBlas.h). It uses AMX
// tiles if the machine has them.
#pragma once

#include "panels.h"

namespace unirl::cpu {

// Whether the loaded torch has brgemm for these factors, BF16 or FP32, and multiplies correctly here. Tested once.
bool has_brgemm(Format format);

// Whether oneDNN may use AMX tiles for bf16 now. The machine, the system, ONEDNN_MAX_CPU_ISA and torch.backends.mkldnn
// must allow it.
bool has_amx();

#if defined(__x86_64__)
// Like the panels of the same factors. They need AVX-512 and has_brgemm; brgemm_bf16 also needs AVX-512 bf16.
extern const PanelKernels brgemm_bf16, brgemm_fp32;
#endif

}  // namespace unirl::cpu
