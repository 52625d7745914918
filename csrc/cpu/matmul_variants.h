// Selects the matmul of this machine, by the measured rates of its kind of core, never by timing a user's step.
#pragma once

#include <string>
#include <vector>

#include "panels.h"

namespace unirl::cpu {

struct MatmulVariant {
  const char* name;  // panels-fp32, panels-bf16: ours; brgemm-fp32, brgemm-bf16: torch's
  const PanelKernels* kernels;
};

// The matmul for factors of a format; null if there is none. UNIRL_CPU_MATMULS forces one for bf16. Factors of other
// formats then take the fp32 matmul of the same family, such as brgemm-fp32 for brgemm-bf16.
// Throws std::runtime_error if UNIRL_CPU_MATMULS is not the name of a matmul, or this machine cannot run it.
const MatmulVariant* variant_of(Format format);

// Names of the matmuls that this machine can run.
std::vector<std::string> matmul_variants();

// Forces a matmul like UNIRL_CPU_MATMULS, for all later calls; "" goes back to the table. For measurements and tests.
// No matmul may be running.
void force_matmuls(const std::string& name);

// The name of the kind of core in the table.
std::string core_kind();

}  // namespace unirl::cpu
