// PTX instructions that stand in the kernels' inline assembly, under their own names with _ for the dots. The
// translation makes a call of each; the result comes first.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "machine/operations.h"

namespace emulator::ptx {

// Subnormal numbers are 0, and 2^0 is 1. Elsewhere the hardware is right to 2 ulp. So is this: it adds an error of up
// to 1.5 ulp, which depends on the bits of x, so that budgets hold for more than exact exponentials.
inline void ex2_approx_ftz_f32(float& result, float x) {
  constexpr float SMALLEST = 0x1p-126f;
  result = exp2f(fabsf(x) < SMALLEST ? 0 : x);
  if (result < SMALLEST) result = 0;
  if (result == 1) return;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const float error = static_cast<float>(bits * 2654435769u >> 8) * 0x1p-23f - 1;
  result += 1.5f * 0x1p-23f * error * result;
}

inline void max_NaN_f32(float& result, float a, float b) { result = a > b || a != a ? a : b; }
inline void min_NaN_f32(float& result, float a, float b) { result = a < b || a != a ? a : b; }

// Two numbers of 16 bits in 32.
template <class Number, float (*WIDEN)(Number), void (*CHOOSE)(float&, float, float)>
inline void of_pairs(uint32_t& result, uint32_t a, uint32_t b) {
  uint16_t halves[2];
  for (int k = 0; k < 2; ++k) {
    const uint16_t x = static_cast<uint16_t>(a >> 16 * k), y = static_cast<uint16_t>(b >> 16 * k);
    float chosen;
    CHOOSE(chosen, WIDEN({x}), WIDEN({y}));
    halves[k] = chosen != chosen ? 0x7fff : chosen == WIDEN({x}) ? x : y;
  }
  result = static_cast<uint32_t>(halves[1]) << 16 | halves[0];
}

inline void max_NaN_bf16x2(uint32_t& result, uint32_t a, uint32_t b) {
  of_pairs<__nv_bfloat16, __bfloat162float, max_NaN_f32>(result, a, b);
}
inline void min_NaN_bf16x2(uint32_t& result, uint32_t a, uint32_t b) {
  of_pairs<__nv_bfloat16, __bfloat162float, min_NaN_f32>(result, a, b);
}
inline void max_NaN_f16x2(uint32_t& result, uint32_t a, uint32_t b) {
  of_pairs<__half, __half2float, max_NaN_f32>(result, a, b);
}
inline void min_NaN_f16x2(uint32_t& result, uint32_t a, uint32_t b) {
  of_pairs<__half, __half2float, min_NaN_f32>(result, a, b);
}

inline void cvt_rn_bf16x2_f32(uint32_t& result, float high, float low) {
  result = static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16 | __float2bfloat16_rn(low).bits;
}

inline void cvt_rn_f16x2_f32(uint32_t& result, float high, float low) {
  result = static_cast<uint32_t>(__float2half_rn(high).bits) << 16 | __float2half_rn(low).bits;
}

inline void barrier_cluster_arrive_relaxed_aligned(
    const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cluster_arrive({"barrier.cluster.arrive", file, line});
}

inline void barrier_cluster_arrive_release_aligned(
    const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  release(machine.running());
  barrier_cluster_arrive_relaxed_aligned(file, line);
}

inline void barrier_cluster_wait_acquire_aligned(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cluster_wait({"barrier.cluster.wait", file, line});
  acquire(machine.running());
}

}  // namespace emulator::ptx
