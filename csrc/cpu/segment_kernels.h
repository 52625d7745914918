// The two sweeps over a segment: sums and gradient. Compiled once per instruction set; simd.h explains the namespace.
#pragma once

#include <type_traits>

#include "../exponential.h"
#include "segment.h"

namespace unirl::cpu::UNIRL_ISA {

// u and du/dv of a row's logits, from v = gain x (see row_math.h). Without a softcap, gain is 1 or -1.
// signed_x: x, or -x if the scale is negative; z increases with it.
struct Plain {
  static constexpr bool BOUNDED = false, NEGATES = false;
  explicit Plain(double) {}
  UNIRL_ALWAYS_INLINE F32 signed_x(F32 x) const { return x; }
  UNIRL_ALWAYS_INLINE F32 v(F32 x) const { return x; }
  static UNIRL_ALWAYS_INLINE Tanh map(F32 v) { return {v, splat(1.0f)}; }
};

struct Negated {
  static constexpr bool BOUNDED = false, NEGATES = true;
  explicit Negated(double) {}
  UNIRL_ALWAYS_INLINE F32 signed_x(F32 x) const { return -x; }
  UNIRL_ALWAYS_INLINE F32 v(F32 x) const { return -x; }
  static UNIRL_ALWAYS_INLINE Tanh map(F32 v) { return {v, splat(1.0f)}; }
};

struct Capped {
  static constexpr bool BOUNDED = true;
  float gain, sign;
  explicit Capped(double gain) : gain((float)gain), sign(gain < 0 ? -1.0f : 1.0f) {}
  UNIRL_ALWAYS_INLINE F32 signed_x(F32 x) const { return x * sign; }
  UNIRL_ALWAYS_INLINE F32 v(F32 x) const { return x * gain; }
  static UNIRL_ALWAYS_INLINE Tanh map(F32 v) { return hyperbolic_tangent(v); }
};

// A segment in steps of STEP logits. The last step is padded with the logit that u maps to -inf or -1.
template <class Format>
struct Steps {
  typedef typename Format::Storage Storage;
  const Storage* x;
  int64_t whole;  // logits in steps without padding
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

  // 0 for the logits of the last step, -inf for its padding.
  Block padding() const {
    Storage values[STEP];
    for (int i = 0; i < STEP; ++i) values[i] = i < rest ? Storage(0) : Format::INFINITY_BITS[1];
    return Format::load(values);
  }
};

constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto smaller = [](auto a, auto b) { return a < b ? a : b; };

// The sum of a segment is a sum of the sums of RUN logits. A lane that adds hundreds of equal numbers rounds them all
// the same way: without runs, a segment of equal logits would have an error of 6e-6 in the baseline.
constexpr int64_t RUN = 32 * STEP;

UNIRL_ALWAYS_INLINE void add(Block& sum, const Block& more) {
  for (int k = 0; k < VECTORS; ++k) sum.of[k] += more.of[k];
}

// Add a step's u, without the padding.
template <class Format>
UNIRL_ALWAYS_INLINE void add_given(Block& sum, Block u, const Steps<Format>& x, int64_t i) {
  if (i >= x.whole) {
    const Block padding = x.padding();
    for (int k = 0; k < VECTORS; ++k) u.of[k] = padding.of[k] == 0 ? u.of[k] : F32{};
  }
  add(sum, u);
}

// Result of the first sweep over a segment.
struct Overview {
  float top;     // the largest of +-x (see Map::signed_x)
  float bottom;  // a lower bound of the logits in whole steps
  Block su;      // the sum of u, if asked for
};

// The overview of 16-bit logits, compared as integers: a vector holds twice as many as in fp32. As unsigned integers,
// negative floats are larger than positive ones. A NaN becomes top or bottom, or the sums find it.
template <class Map, class Format>
Overview packed_overview(const Steps<Format>& x) {
  constexpr int N = 2 * LANES, VECTORS_OF_STEP = STEP / N;
  const U16 flip = U16{} + uint16_t(Map::NEGATES ? 0x8000 : 0);
  const auto block = [&](const uint16_t* from, int k) { return load<U16>(from + k * N) ^ flip; };
  S16 high[VECTORS_OF_STEP];
  U16 low[VECTORS_OF_STEP] = {};
  for (S16& of : high) of = S16{} + int16_t(INT16_MIN);
  for (int64_t i = 0; i < x.whole; i += STEP) {
    for (int k = 0; k < VECTORS_OF_STEP; ++k) {
      const U16 bits = block(x.x + i, k);
      high[k] = larger(high[k], (S16)bits);
      low[k] = larger(low[k], bits);
    }
  }
  for (int k = 0; k < VECTORS_OF_STEP && x.rest > 0; ++k) high[k] = larger(high[k], (S16)block(x.tail, k));
  for (int k = 1; k < VECTORS_OF_STEP; ++k) high[0] = larger(high[0], high[k]), low[0] = larger(low[0], low[k]);
  uint16_t top = reduced<int16_t, UNIRL_SIMD_BYTES>(high[0], larger);
  const uint16_t lowest = reduced<uint16_t, UNIRL_SIMD_BYTES>(low[0], larger);
  if (top & 0x8000) {  // all are negative: the largest is the nearest to 0
    U16 nearest = ~U16{};
    for (int64_t i = 0; i < x.end(); i += STEP) {
      for (int k = 0; k < VECTORS_OF_STEP; ++k) nearest = smaller(nearest, block(i < x.whole ? x.x + i : x.tail, k));
    }
    top = reduced<uint16_t, UNIRL_SIMD_BYTES>(nearest, smaller);
  }
  return {Format::value(top), Format::value(lowest & 0x8000 ? lowest : 0), {}};
}

template <bool PACKED, bool WITH_SU, class Map, class Format>
UNIRL_ALWAYS_INLINE Overview overview(const Steps<Format>& x, const Map& map) {
  if constexpr (PACKED) return packed_overview<Map>(x);
  Block tops, su{};
  for (F32& top : tops.of) top = splat(-__builtin_inff());
  for (int64_t run = 0; run < x.end(); run += RUN) {
    const int64_t end = smaller(run + RUN, x.end());
    Block run_su{};
    for (int64_t i = run; i < end; i += STEP) {
      Block block = x.load(i);
      for (F32& v : block.of) v = map.signed_x(v);
      for (int k = 0; k < VECTORS; ++k) tops.of[k] = maximum(tops.of[k], block.of[k]);
      if (WITH_SU) add_given(run_su, block, x, i);
    }
    if (WITH_SU) add(su, run_su);
  }
  for (int k = 1; k < VECTORS; ++k) tops.of[0] = maximum(tops.of[0], tops.of[k]);
  return {reduced<float, UNIRL_SIMD_BYTES>(tops.of[0], larger), -__builtin_inff(), su};
}

// Formats whose exponentials are kept in the order of the logits, and may replace them in memory.
template <class Format>
constexpr bool IN_PLACE = std::is_same_v<Format, Float32>;

// Where the exponentials of a segment are kept. In place, those of the last step go through tail: memory has no room
// for its padding.
template <class Format>
struct Kept {
  float* e;
  float tail[STEP];

  UNIRL_ALWAYS_INLINE void put(const Steps<Format>& x, int64_t i, const Block& of) {
    Float32::store(IN_PLACE<Format> && i >= x.whole ? tail : e + i, of);
  }
  void finish(const Steps<Format>& x) {
    if (IN_PLACE<Format>) memcpy(e + x.whole, tail, x.rest * sizeof *e);
  }
};

// Sums: Moments<double>, or Observed<double>.
template <class Sums, class Exp, class Map, bool KEEPS, class Format>
Sums sums(const Steps<Format>& x, const Readout<double>& readout, Kept<Format>* kept) {
  constexpr bool OBSERVES = std::is_same_v<Sums, Observed<double>>;
  // Without a softcap, u = +-x and is summed in the first sweep, where registers are free. With one, u costs a tanh.
  constexpr bool SU_FIRST = OBSERVES && !Map::BOUNDED, SU_HERE = OBSERVES && Map::BOUNDED;
  constexpr bool PACKED = sizeof(typename Format::Storage) == 2 && !OBSERVES && !Map::BOUNDED;
  const Map map(readout.gain);
  const Exp exponential(readout.kappa);
  const Overview first = overview<PACKED, SU_FIRST>(x, map);
  const float m = Map::map(map.v(map.signed_x(splat(first.top)))).value[0];
  // If all logits are -inf, there is no finite maximum and the sum is exactly 0.
  const float reference = m == -__builtin_inff() ? 0.0f : m;
  Block s{}, sz{}, s2{}, su = first.su;
  const auto add_run = [&](int64_t run, int64_t end, auto clamps) {
    Block run_s{}, run_sz{}, run_s2{}, run_su{};
    for (int64_t i = run; i < end; i += STEP) {
      // Prefetch the next segment.
      for (size_t at = 0; at < STEP * sizeof *x.x; at += 64) __builtin_prefetch((const char*)(x.x + i + SEGMENT) + at);
      Block u = x.load(i), d, e;
      for (F32& v : u.of) v = Map::map(map.v(v)).value;
      if (SU_HERE) add_given(run_su, u, x, i);
      for (int k = 0; k < VECTORS; ++k) d.of[k] = u.of[k] - reference;
      if (Map::BOUNDED && i >= x.whole) add(d, x.padding());
      if constexpr (clamps) {
        for (F32& of : d.of) of = maximum(splat(exponential.floor), of);
      }
      exponential.evaluate(d.of, 1.0f, e.of);
      if (KEEPS) kept->put(x, i, e);
      for (int k = 0; k < VECTORS; ++k) {
        run_s.of[k] += e.of[k];
        run_sz.of[k] += e.of[k] * d.of[k];
        if (OBSERVES) run_s2.of[k] += e.of[k] * e.of[k];
      }
    }
    add(s, run_s);
    add(sz, run_sz);
    if (OBSERVES) add(s2, run_s2);
    if (SU_HERE) add(su, run_su);
  };
  // If no logit is far below the maximum, whole steps need no clamp.
  int64_t run = 0;
  if constexpr (PACKED) {
    const int64_t near = readout.kappa * (double(first.bottom) - first.top) > -87 ? x.whole : 0;
    for (; run < near; run += RUN) add_run(run, smaller(run + RUN, near), std::false_type{});
    run = near;
  }
  for (int64_t end; run < x.end(); run = end) {
    end = run < x.whole ? smaller(run + RUN, x.whole) : x.end();
    add_run(run, end, std::true_type{});
  }
  if (KEEPS) kept->finish(x);
  const Moments<double> moments = {m, sum(s), sum(sz)};
  if constexpr (OBSERVES) {
    return {moments, sum(s2), sum(su), first.top, 0};
  } else {
    return moments;
  }
}

// Uses the fastest exponential for kappa; in fp32, where memory is the limit, the most accurate one.
template <class Sums, class Map, bool KEEPS, class Format>
Sums sums(const Steps<Format>& x, const Readout<double>& readout, Kept<Format>* kept) {
  if constexpr (HAS_POWERS && !Map::BOUNDED && !std::is_same_v<Format, Float32>) {
    if (step_is_exact(readout.kappa)) {
      return sums<Sums, Exponential<5, true>, Map, KEEPS>(x, readout, kept);
    }
  }
  return sums<Sums, Exponential<5>, Map, KEEPS>(x, readout, kept);
}

template <class Sums, bool KEEPS, class Format>
Sums signed_sums(const Steps<Format>& x, const Readout<double>& readout, Kept<Format>* kept) {
  return readout.gain < 0 ? sums<Sums, Negated, KEEPS>(x, readout, kept) : sums<Sums, Plain, KEEPS>(x, readout, kept);
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
    // Without a linear term, the constant goes into the polynomial at no cost.
    Block result;
    exponential.evaluate(d.of, WITH_LINEAR ? 1.0f : constant, result.of);
    for (int k = 0; k < VECTORS; ++k) {
      if (WITH_LINEAR) result.of[k] *= d.of[k] * linear + constant;
      if (Map::BOUNDED) result.of[k] *= slope.of[k];
    }
    Format::store(i < x.whole ? d_x + i : x.tail, result);
  }
  memcpy(d_x + x.whole, x.tail, x.rest * sizeof *d_x);
}

template <class Format, class Sums>
Sums sums(const void* from, int64_t n, const Readout<double>& readout) {
  const Steps<Format> x(from, n, readout.gain);
  Kept<Format>* const none = nullptr;
  return readout.capped ? sums<Sums, Capped, false>(x, readout, none) : signed_sums<Sums, false>(x, readout, none);
}

template <class Format>
Moments<double> exponentials(const void* from, int64_t n, const Readout<double>& readout, float* e) {
  const Steps<Format> x(from, n, readout.gain);
  Kept<Format> kept = {e, {}};
  return signed_sums<Moments<double>, true>(x, readout, &kept);
}

template <class Format>
void scale(const float* e, void* to, int64_t n, double factor, bool streams) {
  auto* const d_x = static_cast<typename Format::Storage*>(to);
  const F32 by = splat((float)factor);
  const int64_t rest = n % STEP, whole = n - rest;
  const auto scaled = [&](const float* of) {
    Block block = Float32::load(of);
    for (F32& v : block.of) v *= by;
    return block;
  };
  if (streams && (uintptr_t)to % UNIRL_SIMD_BYTES == 0) {
    for (int64_t i = 0; i < whole; i += STEP) Format::stream(d_x + i, scaled(e + i));
    fence();
  } else {
    for (int64_t i = 0; i < whole; i += STEP) Format::store(d_x + i, scaled(e + i));
  }
  if (rest == 0) return;
  float last[STEP] = {};
  memcpy(last, e + whole, (IN_PLACE<Format> ? rest : STEP) * sizeof *e);
  typename Format::Storage tail[STEP];
  Format::store(tail, scaled(last));
  memcpy(d_x + whole, tail, rest * sizeof *d_x);
}

template <class Format>
int64_t find(const void* from, int64_t n, double top, const Readout<double>& readout) {
  const Steps<Format> x(from, n, readout.gain);
  const F32 wanted = splat((float)(readout.gain < 0 ? -top : top));
  U32 columns[VECTORS], first[VECTORS];
  for (int k = 0; k < VECTORS; ++k) {
    for (int lane = 0; lane < LANES; ++lane) columns[k][lane] = Format::column(k, lane);
    first[k] = U32{} + (uint32_t)n;
  }
  // Without a branch: the lanes of a step would have to be searched one by one.
  for (int64_t i = 0; i < x.end(); i += STEP) {
    const Block block = x.load(i);
    for (int k = 0; k < VECTORS; ++k) {
      const U32 found = block.of[k] == wanted ? columns[k] + (uint32_t)i : U32{} + (uint32_t)n;
      first[k] = found < first[k] ? found : first[k];
    }
  }
  uint32_t result = (uint32_t)n;
  for (const U32& of : first) {
    for (int lane = 0; lane < LANES; ++lane) result = of[lane] < result ? of[lane] : result;
  }
  return result;
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
  return Format::value(*static_cast<const typename Format::Storage*>(x));
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
  return {sums<Format, Moments<double>>, sums<Format, Observed<double>>, find<Format>, gradient<Format>, exponentials<Format>,
          scale<Format>, read<Format>, u<Format>, write<Format>, sizeof(typename Format::Storage)};
}

const SegmentKernels kernels[] = {kernels_of<Float32>(), kernels_of<BFloat16>(), kernels_of<Float16>()};

}  // namespace unirl::cpu::UNIRL_ISA
