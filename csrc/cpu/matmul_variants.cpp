#include "matmul_variants.h"

#include <stdlib.h>

#include <stdexcept>

#include "brgemm.h"
#include "dispatch.h"

namespace unirl::cpu {
namespace {

enum Variant { PANELS_FP32, PANELS_BF16, BRGEMM_FP32, BRGEMM_BF16, VARIANTS, NONE = VARIANTS };

#if defined(__x86_64__)

const MatmulVariant AVX2_PANELS = {"panels-fp32", &avx2_panels};
const MatmulVariant AVX512[VARIANTS] = {{"panels-fp32", &avx512_panels},
                                        {"panels-bf16", &avx512_bf16_panels},
                                        {"brgemm-fp32", &brgemm_fp32},
                                        {"brgemm-bf16", &brgemm_bf16}};

struct Core {
  const char* kind;
  bool (*is)();
  Variant fp32, bf16;
};

bool dots_bf16() { return __builtin_cpu_supports("avx512bf16"); }

// The first line that fits is taken. The rates are in benchmarks/NOTES.md, "Matmuls by kind of core".
const Core CORES[] = {
    // Expected, not measured with this code: 750 to 1250 GF/s per core by brgemm in bf16, 163 in fp32.
    {"AMX", [] { return dots_bf16() && has_amx() && has_brgemm(Format::BF16); }, PANELS_FP32, BRGEMM_BF16},
    {"AVX-512 bf16, AMD", [] { return dots_bf16() && __builtin_cpu_is("amd"); }, PANELS_FP32, PANELS_BF16},
    // On these cores vdpbf16ps reaches 77 GF/s, multiply-add in fp32 163.
    {"AVX-512 bf16, Intel", [] { return dots_bf16(); }, PANELS_FP32, PANELS_FP32},
    {"AVX-512", [] { return true; }, PANELS_FP32, PANELS_FP32},
};

// Evaluated at each call: torch.backends.mkldnn may be disabled at any time.
const Core& core() {
  const Core* of = CORES;
  while (!of->is()) ++of;
  return *of;
}

bool has(Variant variant) {
  switch (variant) {
    case PANELS_BF16: return dots_bf16();
    case BRGEMM_FP32: return has_brgemm(Format::FP32);
    case BRGEMM_BF16: return dots_bf16() && has_brgemm(Format::BF16);
    default: return true;
  }
}

#endif

Variant named(const std::string& name) {
  if (name.empty()) return NONE;
  std::string names;
  for (const std::string& variant : matmul_variants()) names += (names.empty() ? "" : ", ") + variant;
#if defined(__x86_64__)
  for (int variant = 0; variant < VARIANTS; ++variant) {
    if (name == AVX512[variant].name && (", " + names + ", ").find(", " + name + ", ") != std::string::npos) {
      return Variant(variant);
    }
  }
#endif
  throw std::runtime_error("UNIRL_CPU_MATMULS must be one that this machine has (" + (names.empty() ? "none" : names) +
                           "), got " + name);
}

Variant& forced() {
  static Variant variant = [] {
    const char* const name = getenv("UNIRL_CPU_MATMULS");
    return named(name == nullptr ? "" : name);
  }();
  return variant;
}

}  // namespace

std::vector<std::string> matmul_variants() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  if (instruction_set() == "avx2") names.push_back(AVX2_PANELS.name);
  for (int variant = 0; instruction_set() == "avx512" && variant < VARIANTS; ++variant) {
    if (has(Variant(variant))) names.push_back(AVX512[variant].name);
  }
#endif
  return names;
}

void force_matmuls(const std::string& name) { forced() = named(name); }

#if defined(__x86_64__)
std::string core_kind() { return instruction_set() == "avx512" ? core().kind : instruction_set(); }

const MatmulVariant* variant_of(Format format) {
  const Variant asked = forced();
  if (format == Format::FP64) return nullptr;
  if (instruction_set() == "avx2") return &AVX2_PANELS;
  if (instruction_set() != "avx512") return nullptr;
  if (asked == NONE) return &AVX512[format == Format::BF16 ? core().bf16 : core().fp32];
  if (format == Format::BF16) return &AVX512[asked];
  return &AVX512[asked == BRGEMM_BF16 || asked == BRGEMM_FP32 ? BRGEMM_FP32 : PANELS_FP32];
}
#else
std::string core_kind() { return instruction_set(); }

const MatmulVariant* variant_of(Format) { return nullptr; }
#endif

}  // namespace unirl::cpu
