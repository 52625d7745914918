#include "dispatch.h"

#include <stdlib.h>

#include <stdexcept>

namespace unirl::cpu {
namespace {

struct InstructionSet {
  std::string name;
  bool supported;
  const SegmentKernels* kernels;
};

const std::vector<InstructionSet>& compiled() {
  static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       avx512_kernels},
      // Every machine with AVX2 has F16C.
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2_kernels},
#endif
      {"baseline", true, baseline_kernels},
  };
  return sets;
}

const InstructionSet& choose() {
  const char* forced = getenv("UNIRL_CPU_ISA");
  std::string names;
  for (const InstructionSet& set : compiled()) {
    names += (names.empty() ? "" : ", ") + set.name;
    if (forced == nullptr || *forced == 0) {
      if (set.supported) return set;
    } else if (set.name == forced) {
      if (set.supported) return set;
      throw std::runtime_error("UNIRL_CPU_ISA is " + set.name + ", which this machine does not support");
    }
  }
  throw std::runtime_error("UNIRL_CPU_ISA must be one of " + names + ", got " + forced);
}

const InstructionSet& chosen() {
  static const InstructionSet& set = choose();
  return set;
}

}  // namespace

std::vector<std::string> compiled_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : compiled()) names.push_back(set.name);
  return names;
}

const std::string& instruction_set() { return chosen().name; }

const SegmentKernels& kernels_for(Format format) {
  if (format == Format::FP64) return fp64_kernels;
  return chosen().kernels[static_cast<int>(format)];
}

}  // namespace unirl::cpu
