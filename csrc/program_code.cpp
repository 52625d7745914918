#include "program_code.h"

#include <charconv>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace unirl {
namespace {

constexpr int64_t HEADER = 3 + N_OUTPUTS;
constexpr int64_t WIDTH = 4;  // numbers of an instruction
constexpr int64_t NO_REGISTER = -1;

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

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::vector<int64_t> numbers_of(const std::string& text) {
  std::vector<int64_t> numbers;
  numbers.reserve(text.size() / 2 + 1);
  const char* at = text.data();
  const char* const end = at + text.size();
  for (;; ++at) {
    while (at != end && *at == ' ') ++at;
    if (at == end) return numbers;
    int64_t number;
    const auto [next, error] = std::from_chars(at, end, number);
    if (error != std::errc() || (next != end && *next != ' ')) {
      refuse("program must be integers with spaces between them, got '" + std::string(at, end).substr(0, 20) + "'");
    }
    numbers.push_back(number);
    if (next == end) return numbers;
    at = next;
  }
}

int32_t checked_count(int64_t value, int64_t most, const std::string& what) {
  if (value < 0 || value > most) {
    refuse("program must have at most " + std::to_string(most) + " " + what + ", got " + std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

// Registers of the text: statistics, fields and params of this program, then one for each instruction.
class Decoder {
 public:
  explicit Decoder(const std::string& text) : numbers_(numbers_of(text)) {
    const int64_t size = numbers_.size();
    if (size < HEADER || (size - HEADER) % WIDTH != 0 || numbers_[2] != (size - HEADER) / WIDTH) {
      refuse("program must hold " + std::to_string(HEADER) + " + " + std::to_string(WIDTH) +
             " n numbers for its n instructions, got " + std::to_string(size));
    }
    program_.n_fields = checked_count(numbers_[0], MAX_FIELDS, "fields");
    program_.n_params = checked_count(numbers_[1], MAX_PARAMS, "params");
    program_.n_instructions = checked_count(numbers_[2], MAX_INSTRUCTIONS, "instructions");
    first_param_ = FIRST_FIELD + program_.n_fields;
    first_result_ = first_param_ + program_.n_params;
  }

  Program decode() {
    check();
    find_last_readers();
    for (int i = MAX_LIVE; i > 0; --i) free_.push_back(static_cast<uint8_t>(FIRST_RESULT + i - 1));
    for (int i = 0; i < program_.n_instructions; ++i) instruct(i);
    for (int i = 0; i < N_OUTPUTS; ++i) {
      program_.outputs[i] = output(i) == NO_REGISTER ? ALWAYS_ZERO : register_of(output(i));
    }
    return program_;
  }

 private:
  int64_t output(int i) const { return numbers_[3 + i]; }
  int64_t opcode(int i) const { return numbers_[HEADER + WIDTH * i]; }
  int64_t operand(int i, int k) const { return numbers_[HEADER + WIDTH * i + 1 + k]; }
  int arity(int i) const { return OPCODES[opcode(i)].arity; }

  void check() const {
    for (int i = 0; i < program_.n_instructions; ++i) {
      if (opcode(i) < 0 || opcode(i) >= N_OPCODES) {
        refuse("instruction " + std::to_string(i) + " must be an opcode in [0, " + std::to_string(N_OPCODES) +
               "), got " + std::to_string(opcode(i)));
      }
      for (int k = 0; k < arity(i); ++k) check_register(operand(i, k), first_result_ + i, "operand", i, k);
    }
    for (int i = 0; i < N_OUTPUTS; ++i) {
      if (output(i) == NO_REGISTER) continue;
      check_register(output(i), first_result_ + program_.n_instructions, "output", i, -1);
    }
  }

  // of: index of the instruction or output that names the register; operand: its index in the instruction, or -1.
  static void check_register(int64_t value, int64_t end, const char* what, int of, int operand) {
    if (value >= 0 && value < end) return;
    const std::string number = std::to_string(of);
    refuse(std::string(what) + " " + (operand < 0 ? number : std::to_string(operand) + " of instruction " + number) +
           " must be a register in [0, " + std::to_string(end) + "), got " + std::to_string(value));
  }

  void find_last_readers() {
    last_reader_.assign(program_.n_instructions, -1);
    for (int i = 0; i < program_.n_instructions; ++i) {
      for (int k = 0; k < arity(i); ++k) note_reader(operand(i, k), i);
    }
    for (int i = 0; i < N_OUTPUTS; ++i) note_reader(output(i), program_.n_instructions);
    slot_.resize(program_.n_instructions);
  }

  void note_reader(int64_t value, int reader) {
    if (value >= first_result_) last_reader_[value - first_result_] = reader;
  }

  void instruct(int i) {
    Instruction& to = program_.instructions[i];
    to.op = static_cast<Op>(opcode(i));
    for (int k = 0; k < arity(i); ++k) to.args[k] = register_of(operand(i, k));
    // Operands are read before the result is written, so the result may take the register of an operand's last use.
    for (int k = 0; k < arity(i); ++k) release(operand(i, k) - first_result_, i);
    if (free_.empty()) {
      refuse("program must keep at most " + std::to_string(MAX_LIVE) +
             " results for later instructions at a time, instruction " + std::to_string(i) + " is one more");
    }
    to.to = slot_[i] = free_.back();
    free_.pop_back();
    if (last_reader_[i] == -1) free_.push_back(slot_[i]);
  }

  // Frees the register of a result after its last reader; only once if two operands are the same result.
  void release(int64_t result, int reader) {
    if (result < 0 || last_reader_[result] != reader) return;
    last_reader_[result] = RELEASED;
    free_.push_back(slot_[result]);
  }

  uint8_t register_of(int64_t value) const {
    if (value >= first_result_) return slot_[value - first_result_];
    return static_cast<uint8_t>(value >= first_param_ ? FIRST_PARAM + (value - first_param_) : value);
  }

  static constexpr int RELEASED = -2;

  const std::vector<int64_t> numbers_;
  Program program_{};
  int64_t first_param_, first_result_;
  std::vector<int> last_reader_;  // of each result: an instruction; n_instructions for an output; -1 for none
  std::vector<uint8_t> slot_, free_;
};

}  // namespace

std::vector<std::string> opcode_names() {
  std::vector<std::string> names;
  for (const Opcode& opcode : OPCODES) names.push_back(opcode.name);
  return names;
}

std::shared_ptr<const Program> decode_program(const std::string& text) {
  // Decoding costs some microseconds, a look-up 0.1 us. A process has few programs: one per objective.
  constexpr size_t MOST_KEPT = 256;
  static std::mutex mutex;
  static auto& kept = *new std::unordered_map<std::string, std::shared_ptr<const Program>>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = kept.find(text);
  if (found != kept.end()) return found->second;
  const auto program = std::make_shared<const Program>(Decoder(text).decode());
  if (kept.size() == MOST_KEPT) kept.clear();
  kept.emplace(text, program);
  return program;
}

}  // namespace unirl
