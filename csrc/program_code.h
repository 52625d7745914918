// Decodes the text of unirl_kernels/program/ir.py to a checked program.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "program.h"

namespace unirl {

// Names of the instructions, in the order of the encoding.
std::vector<std::string> opcode_names();

// Checks and decodes "n_fields n_params n_instructions, 4 outputs, then op a b c per instruction". A checked program
// cannot make the interpreter leave its registers. Throws std::invalid_argument that says what is wrong. Programs are
// cached, so that a text is decoded once. Any thread may call it.
std::shared_ptr<const Program> decode_program(const std::string& text);

}  // namespace unirl
