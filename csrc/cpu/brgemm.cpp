#include "brgemm.h"

#include <dlfcn.h>

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

namespace unirl::cpu {
namespace {

// Signatures that torch has had since 2.6. They are not part of its stable ABI, so they are looked up by name. If a
// torch lacks them, our own panels are used. A: [M, K], C: [M, N] fp32. B: [K, N] fp32, or bf16 as [K / 2][N][2] if
// vnni is set.
using Multiply = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                          const void* a, const void* b, float* c, bool vnni);
using Release = void (*)(bool vnni);
using CouldPack = bool (*)(int8_t scalar_type);

constexpr int8_t SCALAR_TYPE_BFLOAT16 = 15;  // c10::ScalarType

struct Functions {
  Multiply bf16 = nullptr, fp32 = nullptr;
  Release release = nullptr;
  CouldPack could_pack = nullptr;
};

Functions look_up() {
  Functions found;
#if defined(__linux__) && defined(__x86_64__)
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return found;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(torch, name));
  };
  find(found.bf16, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
  find(found.fp32, "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb");
  find(found.release, "_ZN2at6native7cpublas14brgemm_releaseEb");
  find(found.could_pack, "_ZN2at6native7cpublas10could_packEN3c1010ScalarTypeE");
#endif
  return found;
}

const Functions& functions() {
  static const Functions found = look_up();
  return found;
}

// Rows of a call. With WIDE_COLUMNS and a depth of 1024, the factors of a call stay in the L2 cache.
constexpr int64_t ROWS = 64;

// With AMX only deep calls are fast. A column panel of this depth takes 128 KiB, which still stays in the L2 cache.
constexpr int64_t BLOCK_UNITS = 512;

// torch throws if oneDNN was disabled after has_brgemm tried it. The first line of its message is enough: a stack trace
// follows.
[[noreturn]] void refuse(const std::exception& error) {
  const std::string said = error.what();
  throw std::runtime_error(
      "torch.backends.mkldnn must be enabled for matmuls by torch's brgemm; torch says: " +
      said.substr(0, said.find('\n')) + ". UNIRL_CPU_MATMULS names other matmuls, such as panels-fp32");
}

template <int64_t UNIT_DEPTH>
void multiply(const uint32_t* rows, const uint32_t* columns, int64_t units, const float* bias, bool add,
              const Tile& to) {
  const Multiply brgemm = UNIT_DEPTH == 2 ? functions().bf16 : functions().fp32;
  const int64_t depth = units * UNIT_DEPTH;
  for (int64_t column = 0; column < to.columns; column += WIDE_COLUMNS) {
    const int64_t n = std::min(WIDE_COLUMNS, to.columns - column), width = (n + 15) / 16 * 16;
    for (int64_t row = 0; row < to.rows; row += ROWS) {
      const int64_t m = std::min(ROWS, to.rows - row);
      float* const result = to.data + row * to.row_stride + column;
      for (int64_t i = 0; (bias != nullptr || depth == 0) && !add && i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) result[i * to.row_stride + j] = bias == nullptr ? 0 : bias[column + j];
      }
      if (depth == 0) continue;
      try {
        brgemm(m, n, depth, depth, width, to.row_stride, add || bias != nullptr, rows + row * units,
               columns + column * units, result, UNIT_DEPTH == 2);
      } catch (const std::exception& error) {
        refuse(error);
      }
    }
  }
}

// Without this the next bf16 matmul of torch on this thread crashes, since the AMX tiles stay configured for the last
// call.
template <int64_t UNIT_DEPTH>
void release() {
  functions().release(UNIT_DEPTH == 2);
}

// Test: multiplies the rows 1 2 3 4 and 5 6 7 8 by the columns 1 1 1 1, 1 0 0 0 and 0 0 0 1.
template <int64_t UNIT_DEPTH>
bool multiplies() {
  const Functions& torch = functions();
  if ((UNIT_DEPTH == 2 ? torch.bf16 : torch.fp32) == nullptr || torch.release == nullptr) return false;
  constexpr int64_t DEPTH = 4, WIDTH = 16, UNITS = DEPTH / UNIT_DEPTH;
  alignas(64) uint32_t rows[2 * UNITS] = {}, columns[UNITS * WIDTH] = {};
  const auto put = [](uint32_t* units, int64_t unit, int64_t half, float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    units[unit] |= UNIT_DEPTH == 1 ? bits : bits >> 16 << 16 * half;
  };
  for (int64_t k = 0; k < DEPTH; ++k) {
    const int64_t unit = k / UNIT_DEPTH, half = k % UNIT_DEPTH;
    for (int64_t row = 0; row < 2; ++row) put(rows, row * UNITS + unit, half, float(row * DEPTH + k + 1));
    for (int64_t column = 0; column < 3; ++column) {
      const bool one = column == 0 || k == (column == 1 ? 0 : DEPTH - 1);
      put(columns, unit * WIDTH + column, half, one ? 1.0f : 0.0f);
    }
  }
  float result[2][3] = {};
  try {
    multiply<UNIT_DEPTH>(rows, columns, UNITS, nullptr, false, {result[0], 3, 2, 3});
    release<UNIT_DEPTH>();
  } catch (const std::exception&) {
    return false;
  }
  const float expected[2][3] = {{10, 1, 4}, {26, 5, 8}};
  return std::equal(result[0], result[0] + 6, expected[0]);
}

}  // namespace

bool has_brgemm(Format format) {
  if (format == Format::BF16) {
    static const bool bf16 = multiplies<2>();
    return bf16;
  }
  static const bool fp32 = multiplies<1>();
  return format == Format::FP32 && fp32;
}

bool has_amx() {
  return functions().could_pack != nullptr && functions().could_pack(SCALAR_TYPE_BFLOAT16);
}

#if defined(__x86_64__)
const PanelKernels brgemm_bf16 = {
    2, 16, BLOCK_UNITS, [](const Slice& from, uint32_t* to) { avx512_bf16_packing.rows(from, to); },
    [](const Slice& from, uint32_t* to) { avx512_bf16_packing.columns(from, to); }, multiply<2>, release<2>};
const PanelKernels brgemm_fp32 = {
    1, 16, BLOCK_UNITS, [](const Slice& from, uint32_t* to) { avx512_packing.rows(from, to); },
    [](const Slice& from, uint32_t* to) { avx512_packing.columns(from, to); }, multiply<1>, release<1>};
#endif

}  // namespace unirl::cpu
