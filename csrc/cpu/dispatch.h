// Selects the instruction set of this process.
#pragma once

#include <string>
#include <vector>

#include "segment.h"

namespace unirl::cpu {

// Names of the compiled instruction sets, the widest first.
std::vector<std::string> compiled_instruction_sets();

// The one in use: UNIRL_CPU_ISA if set, else the widest of the machine. Decided at the first call.
// Throws std::runtime_error if UNIRL_CPU_ISA is not a compiled instruction set, or the machine lacks it.
const std::string& instruction_set();

// Kernels of the instruction set in use.
const SegmentKernels& kernels_for(Format format);

}  // namespace unirl::cpu
