// The scalar program of an objective, run once per row: (statistics, fields; params) -> (loss, its derivatives).
// The encoding is that of unirl_kernels/program/ir.py.
#pragma once

#include <math.h>
#include <stdint.h>

#include "row_math.h"

namespace unirl {

// Instructions in the order of the encoding, with the number of their operands.
#define UNIRL_OPCODES(X)                                                                               \
  X(ADD, 2) X(SUB, 2) X(MUL, 2) X(DIV, 2) X(NEG, 1) X(ABS, 1) X(SIGN, 1) X(MINIMUM, 2) X(MAXIMUM, 2) \
  X(CLAMP, 3) X(EXP, 1) X(EXPM1, 1) X(LOG, 1) X(LOG1P, 1) X(SQRT, 1) X(TANH, 1) X(SIGMOID, 1)        \
  X(LOGSIGMOID, 1) X(LT, 2) X(LE, 2) X(EQ, 2) X(WHERE, 3)

enum class Op : int32_t {
#define UNIRL_MEMBER(name, arity) name,
  UNIRL_OPCODES(UNIRL_MEMBER)
#undef UNIRL_MEMBER
};

// Registers of the inputs. Outputs are loss, d_logp, d_entropy, d_lse.
enum Input : int32_t { LOGP, ENTROPY, LSE, OLD_LOGP, REF_LOGP, ADVANTAGE };
constexpr int N_INPUTS = 6;
constexpr int N_OUTPUTS = 4;
constexpr int MAX_PARAMS = 32;
constexpr int MAX_INSTRUCTIONS = 192;
constexpr int MAX_REGISTERS = N_INPUTS + MAX_PARAMS + MAX_INSTRUCTIONS;
constexpr int ZERO = -1;  // register of an output that is identically zero, and of a missing operand

struct Instruction {
  Op op;
  int32_t args[3];
};

// A checked program, small enough to pass to a kernel by value.
struct Program {
  int32_t n_params;
  int32_t n_instructions;
  int32_t outputs[N_OUTPUTS];
  Instruction instructions[MAX_INSTRUCTIONS];
};

// NaN in either argument wins, as in torch.minimum, torch.maximum and torch.clamp.
template <class Real>
UNIRL_INLINE Real minimum(Real x, Real y) {
  return x != x || x < y ? x : y;
}

template <class Real>
UNIRL_INLINE Real maximum(Real x, Real y) {
  return x != x || x > y ? x : y;
}

template <class Real>
UNIRL_INLINE Real sigmoid(Real x) {
  return 1 / (1 + exp(-x));
}

template <class Real>
UNIRL_INLINE Real logsigmoid(Real x) {
  return minimum(x, Real(0)) - log1p(exp(-fabs(x)));
}

template <class Real>
UNIRL_INLINE Real evaluate(Op op, Real x, Real y, Real z) {
  switch (op) {
    case Op::ADD: return x + y;
    case Op::SUB: return x - y;
    case Op::MUL: return x * y;
    case Op::DIV: return x / y;
    case Op::NEG: return -x;
    case Op::ABS: return fabs(x);
    case Op::SIGN: return Real(x > 0) - Real(x < 0);
    case Op::MINIMUM: return minimum(x, y);
    case Op::MAXIMUM: return maximum(x, y);
    case Op::CLAMP: return minimum(maximum(x, y), z);
    case Op::EXP: return exp(x);
    case Op::EXPM1: return expm1(x);
    case Op::LOG: return log(x);
    case Op::LOG1P: return log1p(x);
    case Op::SQRT: return sqrt(x);
    case Op::TANH: return tanh(x);
    case Op::SIGMOID: return sigmoid(x);
    case Op::LOGSIGMOID: return logsigmoid(x);
    case Op::LT: return Real(x < y);
    case Op::LE: return Real(x <= y);
    case Op::EQ: return Real(x == y);
    case Op::WHERE: return x != 0 ? y : z;
  }
  return Real(NAN);
}

// Run a program whose inputs and params are the first registers; there is room for MAX_REGISTERS.
template <class Real>
UNIRL_INLINE void run_instructions(const Program& program, Real* registers, Real (&outputs)[N_OUTPUTS]) {
  int next = N_INPUTS + program.n_params;
  for (int i = 0; i < program.n_instructions; ++i) {
    const Instruction& instruction = program.instructions[i];
    Real operands[3];
    for (int k = 0; k < 3; ++k) operands[k] = instruction.args[k] == ZERO ? Real(0) : registers[instruction.args[k]];
    registers[next++] = evaluate(instruction.op, operands[0], operands[1], operands[2]);
  }
  for (int i = 0; i < N_OUTPUTS; ++i) {
    outputs[i] = program.outputs[i] == ZERO ? Real(0) : registers[program.outputs[i]];
  }
}

// Run a program on one row's inputs; params holds program.n_params numbers.
template <class Real>
UNIRL_INLINE void run_program(
    const Program& program, const Real (&inputs)[N_INPUTS], const double* params, Real (&outputs)[N_OUTPUTS]) {
  Real registers[MAX_REGISTERS];
  for (int i = 0; i < N_INPUTS; ++i) registers[i] = inputs[i];
  for (int i = 0; i < program.n_params; ++i) registers[N_INPUTS + i] = Real(params[i]);
  run_instructions(program, registers, outputs);
}

}  // namespace unirl
