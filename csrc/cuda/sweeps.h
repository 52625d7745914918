// The two sweeps of a thread over its block's slice of a row: the sums, then the gradient.
#pragma once

#include <type_traits>

#include "partial_sums.h"
#include "slice.h"

namespace unirl::cuda {

// u and du/dv of a logit.
template <bool CAPPED>
struct Map {
  Readout<float> readout;

  __device__ explicit Map(const Readout<double>& of)
      : readout{static_cast<float>(of.gain), static_cast<float>(of.kappa), CAPPED} {}
  __device__ float u(float x) const { return to_u(readout, x); }
  // u - reference; exactly 0 at the reference.
  __device__ float difference(float x, float reference) const {
    return CAPPED ? u(x) - reference : fmaf(readout.gain, x, -reference);
  }
  __device__ float slope(float x) const {
    if (!CAPPED) return 1;
    // As in row_math.h, with the fast hardware exponential and division.
    const float w = fast_exp2(static_cast<float>(-2 * LOG2E) * fabsf(readout.gain * x));
    return __fdividef(4 * w, (1 + w) * (1 + w));
  }
};

// The largest u of a thread's logits: that of the largest x, or of the smallest x if the gain is negative. Reads each
// group of vectors as soon as its copies have arrived.
template <bool CAPPED, bool NEGATED, bool ALIGNED, class Format>
__device__ float largest(const Slice<Format>& slice, const Map<CAPPED>& map) {
  constexpr int N = Format::N;
  typedef Extreme<Format, NEGATED> Extreme;
  typename Extreme::Type found = Extreme::none();
  int i = threadIdx.x;
#pragma unroll 1
  for (int group = 0; group < COPY_GROUPS; ++group) {
    wait_for_copies(COPY_GROUPS - 1 - group);
    __syncthreads();
    for (const int end = slice.vectors_after(group); i < end; i += THREADS) {
      found = Extreme::of(found, slice.template vector<ALIGNED>(i * N));
    }
  }
  float x = Extreme::reduced(found);
  // The thread whose turn it is takes the logits after the last whole vector.
  if (i == slice.n / N) {
    for (int k = i * N; k < slice.n; ++k) x = NEGATED ? -max_or_nan(-x, -slice[k]) : max_or_nan(x, slice[k]);
  }
  return map.u(x);
}

// A thread's sums relative to m, its own largest u. CLAMPED: differences are raised to the floor of Exponent.
template <bool CLAMPED, bool ALIGNED, bool CAPPED, class Format>
__device__ Moments<float> sums(
    const Slice<Format>& slice, const Map<CAPPED>& map, const Exponent& exponent, float m) {
  constexpr int N = Format::N;
  const float reference = finite_reference(m);
  Moments<float> at = {m, 0, 0};
  int i = threadIdx.x;
  const auto take = [&](float x) {
    float d = map.difference(x, reference);
    if (CLAMPED) d = max_or_nan(d, exponent.floor);
    const float e = fast_exp2(exponent.rate * d);
    at.s += e;
    at.sz += e * d;
  };
#pragma unroll 2
  for (const int end = slice.n / N; i < end; i += THREADS) {
    float x[N];
    Format::unpack(slice.template vector<ALIGNED>(i * N), x);
    for (float one : x) take(one);
  }
  if (i == slice.n / N) {
    for (int k = i * N; k < slice.n; ++k) take(slice[k]);
  }
  return at;
}

template <bool ALIGNED, bool CAPPED, class Format>
__device__ Moments<float> sweep(const Slice<Format>& slice, const Map<CAPPED>& map, const Exponent& exponent) {
  const float m = map.readout.gain < 0 ? largest<CAPPED, true, ALIGNED>(slice, map)
                                       : largest<CAPPED, false, ALIGNED>(slice, map);
  const Moments<float> at = sums<false, ALIGNED>(slice, map, exponent, m);
  // A difference of -inf is rare; 0 times -inf gives NaN, and the sums are computed again. A NaN logit still gives NaN.
  return at.sz == at.sz ? at : sums<true, ALIGNED>(slice, map, exponent, m);
}

// Writes a slice of the gradient that has the same value in all columns except the target's.
template <class Gradient>
__device__ void fill(typename Gradient::Storage* d_x, int n, float value, int target, float at_target) {
  store<Gradient>(d_x, n, [=](int k, auto& of) {
    constexpr int N = sizeof of / sizeof *of;
    for (int i = 0; i < N; ++i) of[i] = target == k + i ? at_target : value;
  });
}

// Writes a slice of the gradient. LINEAR: whether it has a term linear in log p. ALIGNED: whether vectors of logits are
// aligned where vectors of gradients are.
template <bool LINEAR, bool ALIGNED, class Gradient, class Format, bool CAPPED>
__device__ void write(
    typename Gradient::Storage* d_x,
    const Slice<Format>& slice,
    const Map<CAPPED>& map,
    const Exponent& exponent,
    const GradientTerms<float>& terms,
    int target) {
  store<Gradient>(d_x, slice.n, [&](int k, auto& of) {
    constexpr int N = sizeof of / sizeof *of;
    if constexpr (N == 1) {
      of[0] = slice[k];
    } else {
      for (int i = 0; i < N; i += Format::N) {
        Format::unpack(slice.template vector<ALIGNED>(k + i), reinterpret_cast<float(&)[Format::N]>(of[i]));
      }
    }
    for (float& x : of) {
      float d = map.difference(x, terms.reference);
      if (LINEAR) d = max_or_nan(d, exponent.floor);
      const float e = fast_exp2(exponent.rate * d) * (LINEAR ? d * terms.linear + terms.constant : terms.constant);
      x = CAPPED ? e * map.slope(x) : e;
    }
    if (static_cast<unsigned>(target - k) < N) {
      for (int i = 0; i < N; ++i) of[i] = target == k + i ? terms.target : of[i];
    }
  });
}

// Writes the slice of the gradient for these terms. All threads of the block call it.
template <class Gradient, class Format, bool CAPPED>
__device__ __forceinline__ void write_gradient(
    typename Gradient::Storage* d_x,
    const Slice<Format>& slice,
    const Map<CAPPED>& map,
    const Exponent& exponent,
    const GradientTerms<float>& terms,
    int target) {
  if (terms.constant == 0 && terms.linear == 0) {
    fill<Gradient>(d_x, slice.n, 0, target, terms.target);
    return;
  }
  const bool aligned = slice.aligned(head_of<Gradient>(d_x, slice.n));
  const auto to = [&](auto linear, auto same) {
    write<decltype(linear)::value, decltype(same)::value, Gradient>(d_x, slice, map, exponent, terms, target);
  };
  typedef std::true_type Yes;
  typedef std::false_type No;
  if (terms.linear == 0) {
    aligned ? to(No(), Yes()) : to(No(), No());
  } else {
    aligned ? to(Yes(), Yes()) : to(Yes(), No());
  }
}

}  // namespace unirl::cuda
