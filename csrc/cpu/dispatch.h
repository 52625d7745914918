// Which of the compiled instruction sets this process uses.
#pragma once

#include <string>
#include <vector>

#include "segment.h"

namespace unirl::cpu {

// Names of the compiled instruction sets, the widest first.
std::vector<std::string> compiled_instruction_sets();

// The one in use: UNIRL_CPU_ISA where set, else the widest that the machine has. Decided at the first call.
// Throws std::runtime_error when UNIRL_CPU_ISA names none, or one that the machine lacks.
const std::string& instruction_set();

// Kernels of the instruction set in use.
const SegmentKernels& kernels_for(Format format);

}  // namespace unirl::cpu
