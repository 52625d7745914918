// The scalar program of a loss, run once per row: (statistics, fields; params) -> (loss, its derivatives).
// unirl_kernels/program/ir.py defines the text form of programs; program_code.h decodes it.
#pragma once

#include <math.h>
#include <stdint.h>

#include "row_math.h"

namespace unirl {

// Instructions in the order of the encoding, with the number of their operands.
#define UNIRL_OPCODES(X)                                                                               \
  X(ADD, 2) X(SUB, 2) X(MUL, 2) X(DIV, 2) X(NEG, 1) X(ABS, 1) X(SIGN, 1) X(MINIMUM, 2) X(MAXIMUM, 2) \
  X(CLAMP, 3) X(EXP, 1) X(EXPM1, 1) X(LOG, 1) X(LOG1P, 1) X(SQRT, 1) X(TANH, 1) X(SIGMOID, 1)        \
  X(LOGSIGMOID, 1) X(LT, 2) X(LE, 2) X(EQ, 2) X(WHERE, 3) X(POW, 2)

enum class Op : uint8_t {
#define UNIRL_MEMBER(name, arity) name,
  UNIRL_OPCODES(UNIRL_MEMBER)
#undef UNIRL_MEMBER
};

constexpr int MAX_FIELDS = 24;
constexpr int MAX_PARAMS = 96;
constexpr int MAX_INSTRUCTIONS = 512;
constexpr int MAX_LIVE = 128;  // results that later instructions still read

// Registers of a decoded program. Results share the last MAX_LIVE registers; a register is free after its last reader.
enum Register : int { LOGP, ENTROPY, LSE, FIRST_FIELD };
constexpr int FIRST_PARAM = FIRST_FIELD + MAX_FIELDS;
constexpr int FIRST_RESULT = FIRST_PARAM + MAX_PARAMS;
constexpr int ALWAYS_ZERO = 255;  // an output that is identically zero
static_assert(FIRST_RESULT + MAX_LIVE <= ALWAYS_ZERO, "registers are numbered in a byte");

// loss, d_logp, d_entropy, d_lse
constexpr int N_OUTPUTS = 4;

struct Instruction {
  Op op;
  uint8_t to;
  uint8_t args[3];  // unused ones may be any register
};

// A checked program, small enough to pass to a kernel by value.
struct Program {
  int32_t n_fields;
  int32_t n_params;
  int32_t n_instructions;
  uint8_t outputs[N_OUTPUTS];
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
    case Op::POW: return pow(x, y);
  }
  return Real(NAN);
}

// Run a program on one row. inputs(r): register r < FIRST_RESULT; results: room for MAX_LIVE; outputs: N_OUTPUTS.
template <class Real, class Inputs>
UNIRL_INLINE void run_program(const Program& program, const Inputs& inputs, Real* results, Real* outputs) {
  const auto read = [&](int at) { return at < FIRST_RESULT ? inputs(at) : results[at - FIRST_RESULT]; };
  UNIRL_ROLLED for (int i = 0; i < program.n_instructions; ++i) {
    const Instruction& instruction = program.instructions[i];
    const Real x = read(instruction.args[0]), y = read(instruction.args[1]), z = read(instruction.args[2]);
    results[instruction.to - FIRST_RESULT] = evaluate(instruction.op, x, y, z);
  }
  UNIRL_ROLLED for (int i = 0; i < N_OUTPUTS; ++i) {
    outputs[i] = program.outputs[i] == ALWAYS_ZERO ? Real(0) : read(program.outputs[i]);
  }
}

}  // namespace unirl
