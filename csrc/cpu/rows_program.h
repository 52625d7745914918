// Runs a program for several rows at once: an instruction is decoded once for all rows, and simple ones vectorise.
#pragma once

#include "../program.h"

namespace unirl::cpu {

constexpr int ROWS_AT_ONCE = 16;

// Every row gets the same bits as from run_program.
class RowsProgram {
 public:
  RowsProgram(const Program& program, const double* params) : program_(program) {
    for (int i = 0; i < program.n_params; ++i) {
      for (double& value : registers_[FIRST_PARAM + i]) value = params[i];
    }
    for (double& value : registers_[ALWAYS_ZERO]) value = 0;
  }

  // The rows' values of a register below FIRST_PARAM; write them before run.
  double* input(int at) { return registers_[at]; }

  // Runs the first n rows, at most ROWS_AT_ONCE.
  void run(int64_t n) {
    for (int i = 0; i < program_.n_instructions; ++i) {
      const Instruction& of = program_.instructions[i];
      const double *const x = registers_[of.args[0]], *const y = registers_[of.args[1]],
                   *const z = registers_[of.args[2]];
      double* const to = registers_[of.to];
      switch (of.op) {
#define UNIRL_CASE(name, arity)                                                                  \
  case Op::name:                                                                                 \
    for (int64_t k = 0; k < n; ++k) {                                                            \
      to[k] = evaluate(Op::name, x[k], arity > 1 ? y[k] : 0.0, arity > 2 ? z[k] : 0.0);          \
    }                                                                                            \
    break;
        UNIRL_OPCODES(UNIRL_CASE)
#undef UNIRL_CASE
      }
    }
  }

  // The rows' values of output i, 0 <= i < N_OUTPUTS.
  const double* output(int i) const { return registers_[program_.outputs[i]]; }

 private:
  const Program& program_;
  double registers_[ALWAYS_ZERO + 1][ROWS_AT_ONCE];
};

}  // namespace unirl::cpu
