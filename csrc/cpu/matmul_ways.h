// In which way matmuls run on this machine: by measured rates of its kind of core, never by timing a user's step.
#pragma once

#include <string>
#include <vector>

#include "panels.h"

namespace unirl::cpu {

struct MatmulWay {
  const char* name;  // panels-fp32, panels-bf16: ours; brgemm-fp32, brgemm-bf16: torch's
  const PanelKernels* kernels;
};

// How factors of a format are multiplied; null where they are not. UNIRL_CPU_MATMULS forces a way for bf16; factors of
// other formats then take the fp32 form of it, as brgemm-fp32 for brgemm-bf16.
// Throws std::runtime_error when UNIRL_CPU_MATMULS names none, or one that this machine lacks.
const MatmulWay* way_of(Format format);

// Names of the ways that this machine has.
std::vector<std::string> matmul_ways();

// Takes a way as UNIRL_CPU_MATMULS does, for calls from now on; "" takes the table. For measurements and tests: no
// matmul may be running.
void force_matmuls(const std::string& name);

// The kind of core, as the table calls it.
std::string core_kind();

}  // namespace unirl::cpu
