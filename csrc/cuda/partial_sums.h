// The arithmetic of the first sweep: a thread's running sums, and their combination by lanes, warps and ranks.
#pragma once

#include <math.h>

#include "../row_math.h"

namespace unirl::cuda {

constexpr double LOG2E = 1.4426950408889634;

// 2^t; on the device within 2 ulp, and 0 below 2^-126.
UNIRL_INLINE float fast_exp2(float t) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
#else
  return exp2f(t);
#endif
}

// The larger one; NaN if either is NaN, so that a NaN logit reaches the sums.
UNIRL_INLINE float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

// e^(kappa d) = 2^(rate d), which is 0 below floor. A difference of -inf is raised to floor, since 0 times -inf is NaN.
struct Exponent {
  float rate, floor;
};

UNIRL_INLINE Exponent make_exponent(double kappa) {
  const double rate = kappa * LOG2E;
  return {static_cast<float>(rate), static_cast<float>(-127 / rate)};
}

UNIRL_INLINE float difference(float u, float reference, const Exponent& exponent) {
  return max_or_nan(u - reference, exponent.floor);
}

// A part with only -inf logits has no finite maximum; relative to 0 its sums are exactly 0.
UNIRL_INLINE float finite_reference(float m) { return m == -INFINITY ? 0.0f : m; }

UNIRL_INLINE Moments<float> no_moments() { return {-INFINITY, 0, 0}; }

// Sums in double: in fp32, a part that holds the 1 of the maximum would absorb the 1e-9 of the others.
UNIRL_INLINE Moments<double> widen(const Moments<float>& at) { return {at.m, at.s, at.sz}; }

// A part's sums relative to m, the maximum over all parts. Such sums can be added.
UNIRL_INLINE Moments<double> relative_to(float m, const Moments<double>& part, const Exponent& exponent) {
  const float shift = difference(static_cast<float>(part.m), finite_reference(m), exponent);
  const double w = fast_exp2(exponent.rate * shift);
  return {m, w * part.s, w * (part.sz + part.s * shift)};
}

}  // namespace unirl::cuda
