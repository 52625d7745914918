// From the encoding of unirl_kernels/program/ir.py to a checked program.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "program.h"

namespace unirl {

// Names of the instructions, in the order of the encoding.
std::vector<std::string> opcode_names();

// Checks and unpacks [n_params, n_instructions, *outputs, (op, a, b, c)...]. After this the interpreter cannot leave
// its register file. Throws std::invalid_argument saying what is wrong.
Program decode_program(const std::vector<int64_t>& code, int64_t n_params);

// Whether the program reads an input.
bool reads_input(const Program& program, Input input);

}  // namespace unirl
