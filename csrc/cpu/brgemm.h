// Matrix multiplication by the brgemm of the torch that is loaded (oneDNN; at::native::cpublas::brgemm in
// ATen/native/CPUBlas.h): on AMX tiles where the machine has them.
#pragma once

#include "panels.h"

namespace unirl::cpu {

// Whether the loaded torch has it for these factors, BF16 or FP32, and it multiplies right on this machine: tried once.
bool has_brgemm(Format format);

// Whether oneDNN may use AMX tiles for bf16 now: the machine, the system, ONEDNN_MAX_CPU_ISA and torch.backends.mkldnn
// allow it.
bool has_amx();

#if defined(__x86_64__)
// As the panels of the same factors; they need AVX-512, with bf16 for the first, and has_brgemm.
extern const PanelKernels brgemm_bf16, brgemm_fp32;
#endif

}  // namespace unirl::cpu
