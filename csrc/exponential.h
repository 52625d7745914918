// e^x and tanh of vectors, once for every instruction set. See simd.h on the namespace.
#pragma once

#include <math.h>

#include "simd.h"

namespace unirl::cpu::UNIRL_ISA {

// e^(POWER_STEP) = 2^(1/32).
constexpr double POWER_STEP = 0.6931471805599453 / 32;

// True if POWER_STEP / kappa rounds to a float with a relative error below 2^-28. The rounding then changes e^-20 by
// 7e-8 at most. This holds for kappa = 1 and for temperatures in tenths up to 5.8, because log(2) = 11629080 2^-24 up to
// 2.7e-9.
inline bool step_is_exact(double kappa) {
  const double step = POWER_STEP / kappa;
  return kappa > 0x1p-60 && kappa < 0x1p60 && fabs((float)step - step) < 0x1p-28 * step;
}

#if defined(__x86_64__) && UNIRL_SIMD_BYTES == 64

constexpr bool HAS_POWERS = true;

// 2^(j / 32).
constexpr float POWERS[32] = {
    1.0f,         1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f,  1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f,  1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f,  1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};

struct PowerBits {
  uint32_t of[32];
};

// The bits of 2^(j / 32) minus j 2^18. Adding n 2^18, for n = 32 k + j, gives the bits of 2^(n / 32).
constexpr PowerBits power_bits() {
  PowerBits bits{};
  for (uint32_t j = 0; j < 32; ++j) bits.of[j] = __builtin_bit_cast(uint32_t, POWERS[j]) - (j << 18);
  return bits;
}

alignas(64) constexpr PowerBits POWER_BITS = power_bits();

// Computes e^(kappa d) for d <= 0 as 2^(n / 32) 2^(r / 32), with n an integer. The 32 powers are a table in two
// registers. It takes half the multiplications of a polynomial on [-1/2, 1/2]. DEGREE selects the accuracy: the error
// is not larger than that of the polynomial of this degree below. BY_STEP needs step_is_exact and saves a
// multiplication: r = d - n step. Its error grows with -d: see step_is_exact.
template <int DEGREE, bool BY_STEP = false>
struct Exponential {
  // Approximations of e^y on |y| <= log(2) / 64. 1 + y (FIRST + SECOND y) has a relative error of at most 5.3e-8.
  // SHORT: 1 + MEAN + FIRST y has at most 3.9e-5, and 0 on average.
  static constexpr bool SHORT = DEGREE == 3;
  static constexpr double FIRST = SHORT ? 0.99998042 : 1.00001466, SECOND = 0.49999998, MEAN = 1.958e-5;

  float rate, low;  // steps per unit of d, as the sum of two floats
  float step;
  float first, second;
  float floor;  // the d at which the result is 2^-127 and counts as 0
  F32 powers[2];

  explicit UNIRL_ALWAYS_INLINE Exponential(double kappa) {
    const double steps = kappa / POWER_STEP, unit = BY_STEP ? kappa : POWER_STEP;
    rate = (float)steps;
    low = (float)(steps - rate);
    step = (float)(POWER_STEP / kappa);
    first = (float)(FIRST * unit);
    second = (float)(SECOND * unit * unit);
    floor = (float)(-127 * 32 / steps);
    for (int k = 0; k < 2; ++k) powers[k] = load<F32>(POWER_BITS.of + k * LANES);
  }

  // result = scale e^(kappa d). With DEGREE 4 and 5 it is exactly scale at d = 0. d is at least floor, or NaN, which
  // stays.
  template <int N>
  UNIRL_ALWAYS_INLINE void evaluate(const F32 (&d)[N], float scale, F32 (&result)[N]) const {
    const float magic = 12582912.0f;  // 1.5 * 2^23: the low bits of the sum are n
    F32 sum[N], r[N], power[N], p[N];
    for (int k = 0; k < N; ++k) sum[k] = d[k] * rate + magic;
    for (int k = 0; k < N; ++k) {
      const F32 n = sum[k] - magic;
      r[k] = BY_STEP ? d[k] - n * step : d[k] * rate - n;
    }
    if (DEGREE == 5 && !BY_STEP) {
      for (int k = 0; k < N; ++k) r[k] = d[k] * low + r[k];
    }
    for (int k = 0; k < N; ++k) {
      const __m512 of_j = _mm512_permutex2var_ps((__m512)powers[0], (__m512i)sum[k], (__m512)powers[1]);
      power[k] = (F32)((U32)of_j + ((U32)sum[k] << 18));
    }
    // DEGREE 5 adds the power last, so that only one rounding matters. The others put scale into the polynomial.
    if (DEGREE == 5) {
      for (int k = 0; k < N; ++k) p[k] = r[k] * second + first;
      for (int k = 0; k < N; ++k) result[k] = ((power[k] * r[k]) * p[k] + power[k]) * scale;
    } else {
      for (int k = 0; k < N; ++k) p[k] = SHORT ? splat(scale * first) : r[k] * (scale * second) + scale * first;
      for (int k = 0; k < N; ++k) p[k] = p[k] * r[k] + scale * (float)(SHORT ? 1 + MEAN : 1);
      for (int k = 0; k < N; ++k) result[k] = p[k] * power[k];
    }
  }
};

#else

constexpr bool HAS_POWERS = false;

// Minimax polynomials of 2^f on [-1/2, 1/2], lowest power first; the comment is the largest relative error. Degrees 4
// and 5 are exactly 1 at f = 0. Degree 3 has an error of 0 on average and of 2e-5 at 0. A polynomial of degree 3 that
// is 1 at 0 would have at most 1.0e-4, but would make gradients too large by 4.4e-5.
template <int DEGREE>
constexpr float EXP2[DEGREE + 1] = {};
template <>
constexpr float EXP2<3>[] = {
    0.9999799728393555f, 0.6938114166259766f, 0.24206402897834778f, 0.05274371802806854f};  // 1.5e-4
template <>
constexpr float EXP2<4>[] = {  // 2.8e-6
    1, 0.6931241750717163f, 0.24024099111557007f, 0.055906426161527634f, 0.009582852944731712f};
template <>
constexpr float EXP2<5>[] = {  // 1.1e-7
    1,
    0.6931470036506653f,
    0.24022242426872253f,
    0.05550733581185341f,
    0.009671512991189957f,
    0.001326472731307149f};

// Computes e^(kappa d) for d <= 0 as 2^t, t = kappa log2(e) d, with kappa log2(e) as the sum of two floats. DEGREE 5
// has a relative error of at most 2.0e-7. Lower degrees are for results that are rounded to 16 bits.
template <int DEGREE, bool = false>
struct Exponential {
  float high, low;
  float floor;  // the d at which t = -127 and the result is 0

  explicit UNIRL_ALWAYS_INLINE Exponential(double kappa) {
    const double rate = kappa * 1.4426950408889634;
#ifdef UNIRL_HAS_FMA
    high = (float)rate;
#else
    // Without FMA, high has 12 bits: its product with 12 bits of d is exact.
    const float nearest = (float)rate;
    uint32_t bits;
    memcpy(&bits, &nearest, sizeof bits);
    bits &= 0xfffff000u;
    memcpy(&high, &bits, sizeof high);
#endif
    low = (float)(rate - high);
    floor = (float)(-127 / rate);
  }

  // As above.
  template <int N>
  UNIRL_ALWAYS_INLINE void evaluate(const F32 (&d)[N], float scale, F32 (&result)[N]) const {
    // 1.5 * 2^23 + 127: the low bits of the sum are the rounded exponent plus 127. An exponent of -127 makes them 0.
    const float magic = 12583039.0f;
    F32 biased[N], f[N], p[N];
#ifdef UNIRL_HAS_FMA
    for (int k = 0; k < N; ++k) biased[k] = d[k] * high + magic;
    for (int k = 0; k < N; ++k) f[k] = d[k] * high - (biased[k] - magic);
    if (DEGREE == 5) {
      for (int k = 0; k < N; ++k) f[k] = d[k] * low + f[k];
    }
#else
    for (int k = 0; k < N; ++k) {
      const F32 lead = (F32)((U32)d[k] & 0xfffff000u);
      const F32 rest = (d[k] - lead) * high + d[k] * low;
      biased[k] = lead * high + rest + magic;
      f[k] = (lead * high - (biased[k] - magic)) + rest;
    }
#endif
    for (int k = 0; k < N; ++k) p[k] = splat(scale * EXP2<DEGREE>[DEGREE]);
    for (int power = DEGREE - 1; power >= 0; --power) {
      for (int k = 0; k < N; ++k) p[k] = p[k] * f[k] + scale * EXP2<DEGREE>[power];
    }
    for (int k = 0; k < N; ++k) result[k] = p[k] * (F32)((U32)biased[k] << 23);
  }
};

#endif

// Returns v, rounded. Without this the compiler may contract the product v into a following addition, differently in
// each function. The tanh of one logit would then have two values, and a target could differ from the row's maximum
// although it is that maximum.
UNIRL_ALWAYS_INLINE F32 uncontracted(F32 v) {
#if defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
}

// tanh(v), and 1 - tanh(v)^2 without cancellation, both from w = e^(-2|v|).
struct Tanh {
  F32 value, slope;
};

UNIRL_ALWAYS_INLINE Tanh hyperbolic_tangent(F32 product) {
  const F32 v = uncontracted(product);
  const Exponential<5> exponential(2);
  const F32 magnitude = (F32)((U32)v & 0x7fffffffu);
  const F32 d[] = {maximum(splat(exponential.floor), -magnitude)};
  F32 e[1];
  exponential.evaluate(d, 1.0f, e);
  const F32 w = e[0];
  const F32 inverse = 1.0f / (1.0f + w);
  const F32 large = (F32)((U32)((1.0f - w) * inverse) | ((U32)v & 0x80000000u));
  // v + v^3 P(v^2) on [-0.625, 0.625], where 1 - w would cancel. Relative error of the rounded coefficients: 8.6e-9.
  const F32 v2 = v * v;
  F32 p = v2 * -0.005704985931515694f + 0.02063908614218235f;
  p = p * v2 - 0.05373971536755562f;
  p = p * v2 + 0.13331441581249237f;
  p = p * v2 - 0.3333328068256378f;
  const F32 small = p * (v2 * v) + v;
  return {magnitude < 0.625f ? small : large, 4.0f * w * inverse * inverse};
}

}  // namespace unirl::cpu::UNIRL_ISA
