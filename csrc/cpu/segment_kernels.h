// The two sweeps over a segment, compiled once per instruction set. See simd.h on the namespace.
#pragma once

#include "../simd.h"
#include "segment.h"

namespace unirl::cpu::UNIRL_ISA {

// u and du/dv of a row's logits, from v = gain x (see row_math.h). Without a softcap gain is 1 or -1.
struct Plain {
  static constexpr bool BOUNDED = false;
  explicit Plain(double) {}
  UNIRL_ALWAYS_INLINE F32 v(F32 x) const { return x; }
  static UNIRL_ALWAYS_INLINE Tanh map(F32 v) { return {v, splat(1.0f)}; }
};

struct Negated {
  static constexpr bool BOUNDED = false;
  explicit Negated(double) {}
  UNIRL_ALWAYS_INLINE F32 v(F32 x) const { return -x; }
  static UNIRL_ALWAYS_INLINE Tanh map(F32 v) { return {v, splat(1.0f)}; }
};

struct Capped {
  static constexpr bool BOUNDED = true;
  float gain;
  explicit Capped(double gain) : gain((float)gain) {}
  UNIRL_ALWAYS_INLINE F32 v(F32 x) const { return x * gain; }
  static UNIRL_ALWAYS_INLINE Tanh map(F32 v) { return hyperbolic_tangent(v); }
};

// A segment in steps of STEP logits, the last of them filled up with the logit that u maps to -inf or -1.
template <class Format>
struct Steps {
  typedef typename Format::Storage Storage;
  const Storage* x;
  int64_t whole;  // logits in steps that need no filling
  int64_t rest;
  Storage tail[STEP];

  Steps(const void* from, int64_t n, double gain)
      : x(static_cast<const Storage*>(from)), whole(n - n % STEP), rest(n % STEP) {
    if (rest == 0) return;
    for (int i = 0; i < STEP; ++i) tail[i] = Format::INFINITY_BITS[gain > 0];
    memcpy(tail, x + whole, rest * sizeof *x);
  }

  UNIRL_ALWAYS_INLINE int64_t end() const { return whole + rest; }
  UNIRL_ALWAYS_INLINE Block load(int64_t i) const { return Format::load(i < whole ? x + i : tail); }

  // 0 for the logits of the last step, -inf for its filling.
  Block filling() const {
    Storage values[STEP];
    for (int i = 0; i < STEP; ++i) values[i] = i < rest ? Storage(0) : Format::INFINITY_BITS[1];
    return Format::load(values);
  }
};

// Logits that are summed before their sum joins the segment's. A lane that adds hundreds of like numbers rounds them
// all alike: without runs a segment of equal logits would be off by 6e-6 in the baseline.
constexpr int64_t RUN = 32 * STEP;

template <class Map, class Format>
UNIRL_ALWAYS_INLINE float largest_v(const Steps<Format>& x, const Map& map) {
  Block tops;
  for (F32& top : tops.of) top = splat(-__builtin_inff());
  for (int64_t i = 0; i < x.end(); i += STEP) {
    const Block block = x.load(i);
    for (int k = 0; k < VECTORS; ++k) tops.of[k] = maximum(tops.of[k], map.v(block.of[k]));
  }
  for (int k = 1; k < VECTORS; ++k) tops.of[0] = maximum(tops.of[0], tops.of[k]);
  return largest(tops.of[0]);
}

template <class Map, class Format>
Moments<double> moments(const Steps<Format>& x, const Readout<double>& readout) {
  const Map map(readout.gain);
  const Exponential<5> exponential(readout.kappa);
  const float m = Map::map(splat(largest_v(x, map))).value[0];
  // A segment of -inf alone has no finite maximum; its sum is then an exact zero.
  const float reference = m == -__builtin_inff() ? 0.0f : m;
  Block s{}, sz{};
  for (int64_t run = 0; run < x.end(); run += RUN) {
    const int64_t end = run + RUN < x.end() ? run + RUN : x.end();
    Block run_s{}, run_sz{};
    for (int64_t i = run; i < end; i += STEP) {
      // The next segment arrives while this one is summed.
      for (size_t at = 0; at < STEP * sizeof *x.x; at += 64) __builtin_prefetch((const char*)(x.x + i + SEGMENT) + at);
      Block d = x.load(i);
      for (F32& v : d.of) v = maximum(splat(exponential.floor), Map::map(map.v(v)).value - reference);
      if (Map::BOUNDED && i >= x.whole) {
        const Block filling = x.filling();
        for (int k = 0; k < VECTORS; ++k) d.of[k] = maximum(splat(exponential.floor), d.of[k] + filling.of[k]);
      }
      const Block e = exponential(d, 1.0f);
      for (int k = 0; k < VECTORS; ++k) {
        run_s.of[k] += e.of[k];
        run_sz.of[k] += e.of[k] * d.of[k];
      }
    }
    for (int k = 0; k < VECTORS; ++k) {
      s.of[k] += run_s.of[k];
      sz.of[k] += run_sz.of[k];
    }
  }
  return {m, sum(s), sum(sz)};
}

template <class Map, bool WITH_LINEAR, class Format>
void gradient(
    Steps<Format>& x,
    typename Format::Storage* d_x,
    const Readout<double>& readout,
    const GradientTerms<double>& terms) {
  const Map map(readout.gain);
  const Exponential<Format::EXP_DEGREE> exponential(readout.kappa);
  const float reference = (float)terms.reference;
  const float constant = (float)terms.constant, linear = (float)terms.linear;
  for (int64_t i = 0; i < x.end(); i += STEP) {
    Block d = x.load(i), slope;
    for (int k = 0; k < VECTORS; ++k) {
      const Tanh mapped = Map::map(map.v(d.of[k]));
      d.of[k] = maximum(splat(exponential.floor), mapped.value - reference);
      slope.of[k] = mapped.slope;
    }
    // Without a linear term the constant goes into the polynomial, where it costs nothing.
    Block result = exponential(d, WITH_LINEAR ? 1.0f : constant);
    for (int k = 0; k < VECTORS; ++k) {
      if (WITH_LINEAR) result.of[k] *= d.of[k] * linear + constant;
      if (Map::BOUNDED) result.of[k] *= slope.of[k];
    }
    Format::store(i < x.whole ? d_x + i : x.tail, result);
  }
  memcpy(d_x + x.whole, x.tail, x.rest * sizeof *d_x);
}

template <class Format>
Moments<double> moments(const void* from, int64_t n, const Readout<double>& readout) {
  const Steps<Format> x(from, n, readout.gain);
  if (readout.capped) return moments<Capped>(x, readout);
  return readout.gain < 0 ? moments<Negated>(x, readout) : moments<Plain>(x, readout);
}

template <class Format>
void gradient(
    const void* from, void* to, int64_t n, const Readout<double>& readout, const GradientTerms<double>& terms) {
  Steps<Format> x(from, n, readout.gain);
  auto* const d_x = static_cast<typename Format::Storage*>(to);
  if (readout.capped) {
    gradient<Capped, true>(x, d_x, readout, terms);
  } else if (readout.gain < 0) {
    gradient<Negated, true>(x, d_x, readout, terms);
  } else if (terms.linear != 0) {
    gradient<Plain, true>(x, d_x, readout, terms);
  } else {
    gradient<Plain, false>(x, d_x, readout, terms);
  }
}

template <class Format>
double read(const void* x) {
  return Steps<Format>(x, 1, 1).load(0).of[0][0];
}

template <class Format>
double u(const void* x, const Readout<double>& readout) {
  const float v = (float)readout.gain * (float)read<Format>(x);
  return readout.capped ? hyperbolic_tangent(splat(v)).value[0] : v;
}

template <class Format>
void write(void* x, double value) {
  typename Format::Storage entry[STEP];
  Format::store(entry, {splat((float)value)});
  memcpy(x, entry, sizeof *entry);
}

template <class Format>
constexpr SegmentKernels kernels_of() {
  return {moments<Format>, gradient<Format>, read<Format>, u<Format>, write<Format>, sizeof(typename Format::Storage)};
}

const SegmentKernels kernels[] = {kernels_of<Float32>(), kernels_of<BFloat16>(), kernels_of<Float16>()};

}  // namespace unirl::cpu::UNIRL_ISA
