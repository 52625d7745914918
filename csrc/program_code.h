// From the text of unirl_kernels/program/ir.py to a checked program.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "program.h"

namespace unirl {

// Names of the instructions, in the order of the encoding.
std::vector<std::string> opcode_names();

// Checks and decodes "n_fields n_params n_instructions, 4 outputs, then op a b c per instruction". After this the
// interpreter cannot leave its registers. Throws std::invalid_argument saying what is wrong. Programs are kept, so that
// a text is decoded once; any thread may call.
std::shared_ptr<const Program> decode_program(const std::string& text);

}  // namespace unirl
