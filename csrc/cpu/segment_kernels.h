// The two sweeps over a segment, compiled once per instruction set. See simd.h on the namespace.
#pragma once

#include "../simd.h"
#include "segment.h"

namespace unirl::cpu::UNIRL_ISA {

// u and du/dv of a row's logits, from v = gain x (see row_math.h).
struct Linear {
  static UNIRL_ALWAYS_INLINE F32 u(F32 v) { return v; }
  static UNIRL_ALWAYS_INLINE Tanh with_slope(F32 v) { return {v, splat(1.0f)}; }
};

struct Capped {
  static UNIRL_ALWAYS_INLINE F32 u(F32 v) { return hyperbolic_tangent(v).value; }
  static UNIRL_ALWAYS_INLINE Tanh with_slope(F32 v) { return hyperbolic_tangent(v); }
};

// A segment in steps of STEP logits, the last of them filled up with logits of weight zero.
template <class Format>
struct Steps {
  typedef typename Format::Storage Storage;
  const Storage* x;
  int64_t whole;  // logits in steps that need no filling
  int64_t rest;
  Storage tail[STEP];

  Steps(const Storage* x, int64_t n, float gain) : x(x), whole(n - n % STEP), rest(n % STEP) {
    if (rest == 0) return;
    for (int i = 0; i < STEP; ++i) tail[i] = Format::INFINITY_BITS[gain > 0];
    memcpy(tail, x + whole, rest * sizeof *x);
  }

  UNIRL_ALWAYS_INLINE int64_t end() const { return whole + rest; }
  UNIRL_ALWAYS_INLINE Block load(int64_t i) const { return Format::load(i < whole ? x + i : tail); }
};

template <class Format>
UNIRL_ALWAYS_INLINE float largest_v(const Steps<Format>& x, float gain) {
  F32 tops[VECTORS];
  for (F32& top : tops) top = splat(-__builtin_inff());
  for (int64_t i = 0; i < x.end(); i += STEP) {
    const Block v = x.load(i);
    for (int k = 0; k < VECTORS; ++k) tops[k] = maximum(tops[k], v.of[k] * gain);
  }
  for (int k = 1; k < VECTORS; ++k) tops[0] = maximum(tops[0], tops[k]);
  return largest(tops[0]);
}

template <class Format, class Map>
Moments<double> moments(const Steps<Format>& x, float gain, Exponential exponential) {
  const float m = Map::u(splat(largest_v(x, gain)))[0];
  // A segment of -inf alone has no finite maximum; its sum is then an exact zero.
  const float reference = m == -__builtin_inff() ? 0.0f : m;
  Block s{}, sz{};
  for (int64_t i = 0; i < x.end(); i += STEP) {
    // The next segment arrives while this one is summed.
    for (int k = 0; k < (int)(STEP * sizeof *x.x); k += 64) __builtin_prefetch((const char*)(x.x + i + SEGMENT) + k);
    Block d = x.load(i);
    for (F32& v : d.of) v = maximum(splat(exponential.floor), Map::u(v * gain) - reference);
    const Block e = exponential(d);
    for (int k = 0; k < VECTORS; ++k) {
      s.of[k] += e.of[k];
      sz.of[k] += e.of[k] * d.of[k];
    }
  }
  return {m, sum(s), sum(sz)};
}

template <class Format, class Map, bool WITH_LINEAR>
void gradient(
    Steps<Format>& steps,
    typename Format::Storage* d_x,
    float gain,
    Exponential exponential,
    const GradientTerms<double>& terms) {
  const float reference = (float)terms.reference;
  const float constant = (float)terms.constant, linear = (float)terms.linear;
  for (int64_t i = 0; i < steps.end(); i += STEP) {
    const Block x = steps.load(i);
    Block d, slope;
    for (int k = 0; k < VECTORS; ++k) {
      const Tanh mapped = Map::with_slope(x.of[k] * gain);
      d.of[k] = maximum(splat(exponential.floor), mapped.value - reference);
      slope.of[k] = mapped.slope;
    }
    Block e = exponential(d);
    for (int k = 0; k < VECTORS; ++k) {
      const F32 factor = WITH_LINEAR ? d.of[k] * linear + constant : splat(constant);
      e.of[k] = e.of[k] * factor * slope.of[k];
    }
    Format::store(i < steps.whole ? d_x + i : steps.tail, e);
  }
  memcpy(d_x + steps.whole, steps.tail, steps.rest * sizeof *d_x);
}

template <class Format>
Moments<double> moments(const void* from, int64_t n, const Readout<double>& readout) {
  const Exponential exponential(readout.kappa);
  const float gain = (float)readout.gain;
  const Steps<Format> x(static_cast<const typename Format::Storage*>(from), n, gain);
  return readout.capped ? moments<Format, Capped>(x, gain, exponential)
                        : moments<Format, Linear>(x, gain, exponential);
}

template <class Format>
void gradient(
    const void* from, void* to, int64_t n, const Readout<double>& readout, const GradientTerms<double>& terms) {
  const Exponential exponential(readout.kappa);
  const float gain = (float)readout.gain;
  Steps<Format> x(static_cast<const typename Format::Storage*>(from), n, gain);
  auto* d_x = static_cast<typename Format::Storage*>(to);
  if (readout.capped) {
    gradient<Format, Capped, true>(x, d_x, gain, exponential, terms);
  } else if (terms.linear != 0) {
    gradient<Format, Linear, true>(x, d_x, gain, exponential, terms);
  } else {
    gradient<Format, Linear, false>(x, d_x, gain, exponential, terms);
  }
}

template <class Format>
double read(const void* x) {
  return Steps<Format>(static_cast<const typename Format::Storage*>(x), 1, 1.0f).load(0).of[0][0];
}

template <class Format>
void write(void* x, double value) {
  typename Format::Storage entry[STEP];
  Format::store(entry, {splat((float)value)});
  memcpy(x, entry, sizeof *entry);
}

template <class Format>
constexpr SegmentKernels kernels_of() {
  return {moments<Format>, gradient<Format>, read<Format>, write<Format>, sizeof(typename Format::Storage)};
}

const SegmentKernels kernels[] = {kernels_of<Float32>(), kernels_of<BFloat16>(), kernels_of<Float16>()};

}  // namespace unirl::cpu::UNIRL_ISA
