#include "program_code.h"

#include <algorithm>
#include <stdexcept>

namespace unirl {
namespace {

constexpr int64_t HEADER = 2 + N_OUTPUTS;

struct Opcode {
  const char* name;
  int arity;
};

constexpr Opcode OPCODES[] = {
#define UNIRL_OPCODE(name, arity) {#name, arity},
    UNIRL_OPCODES(UNIRL_OPCODE)
#undef UNIRL_OPCODE
};

constexpr int64_t N_OPCODES = sizeof OPCODES / sizeof *OPCODES;

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

int32_t checked_register(int64_t value, int64_t end, const std::string& what) {
  require(
      value >= 0 && value < end,
      what + " must be a register in [0, " + std::to_string(end) + "), got " + std::to_string(value));
  return static_cast<int32_t>(value);
}

}  // namespace

std::vector<std::string> opcode_names() {
  std::vector<std::string> names;
  for (const Opcode& opcode : OPCODES) names.push_back(opcode.name);
  return names;
}

Program decode_program(const std::vector<int64_t>& code, int64_t n_params) {
  const int64_t size = code.size();
  require(
      size >= HEADER && code[1] >= 0 && code[1] <= MAX_INSTRUCTIONS && size == HEADER + 4 * code[1],
      "code must hold " + std::to_string(HEADER) + " + 4 n integers for its n <= " +
          std::to_string(MAX_INSTRUCTIONS) + " instructions, got " + std::to_string(size));
  require(
      code[0] == n_params && n_params <= MAX_PARAMS,
      "params must hold the program's " + std::to_string(code[0]) + " numbers, at most " +
          std::to_string(MAX_PARAMS) + ", got " + std::to_string(n_params));
  Program program{};
  program.n_params = static_cast<int32_t>(code[0]);
  program.n_instructions = static_cast<int32_t>(code[1]);
  int64_t end = N_INPUTS + n_params;
  for (int i = 0; i < program.n_instructions; ++i, ++end) {
    const int64_t* word = &code[HEADER + 4 * i];
    const std::string where = "instruction " + std::to_string(i);
    require(
        word[0] >= 0 && word[0] < N_OPCODES,
        where + " must be an opcode in [0, " + std::to_string(N_OPCODES) + "), got " + std::to_string(word[0]));
    Instruction& instruction = program.instructions[i];
    instruction.op = static_cast<Op>(word[0]);
    for (int k = 0; k < 3; ++k) {
      const bool used = k < OPCODES[word[0]].arity;
      instruction.args[k] =
          used ? checked_register(word[1 + k], end, "operand " + std::to_string(k) + " of " + where) : ZERO;
    }
  }
  for (int i = 0; i < N_OUTPUTS; ++i) {
    program.outputs[i] =
        code[2 + i] == ZERO ? ZERO : checked_register(code[2 + i], end, "output " + std::to_string(i));
  }
  return program;
}

bool reads_input(const Program& program, Input input) {
  const auto is_input = [input](int32_t at) { return at == input; };
  if (std::any_of(program.outputs, program.outputs + N_OUTPUTS, is_input)) return true;
  return std::any_of(
      program.instructions, program.instructions + program.n_instructions,
      [&](const Instruction& i) { return std::any_of(i.args, i.args + 3, is_input); });
}

}  // namespace unirl
