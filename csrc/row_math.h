// The mathematics of one row of logits, for every backend in csrc: scalars only, no torch, no vectors.
//
// With raw logits x, target y:
//   z = kappa u,  u = gain x  or, with a softcap,  u = tanh(gain x)
//   lse = log sum_j e^z_j,  logp = z_y - lse,  H = lse - sum_j p_j z_j,  p = softmax(z)
//   dL/dz_j = p_j ((d_lse - d_logp) - d_entropy (log p_j + H)) + d_logp [j = y]
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define UNIRL_INLINE __host__ __device__ inline
#define UNIRL_ROLLED _Pragma("unroll 1")
#else
#define UNIRL_INLINE inline
#define UNIRL_ROLLED
#endif

namespace unirl {

// Target of a shard's row if another shard holds the target's column.
constexpr int64_t ELSEWHERE = INT64_MIN;

// Whether the target is one of the row's vocab columns.
UNIRL_INLINE bool has_column(int64_t target, int64_t vocab) { return target >= 0 && target < vocab; }

// Whether the row is read: it is not ignored, and its target is valid.
UNIRL_INLINE bool is_read(int64_t target, int64_t vocab) { return target == ELSEWHERE || has_column(target, vocab); }

// Maps raw logits to those of the distribution. kappa > 0, so that the largest u has the largest z.
template <class Real>
struct Readout {
  Real gain;
  Real kappa;
  bool capped;
};

// Sums over a part of a row, relative to its own largest u.
template <class Real>
struct Moments {
  Real m;   // max_j u_j; -inf for an empty part
  Real s;   // sum_j e^(kappa (u_j - m))
  Real sz;  // sum_j e^(kappa (u_j - m)) (u_j - m)
};

// Moments and observations of a part of a row.
template <class Real>
struct Observed : Moments<Real> {
  Real s2;     // sum_j e^(2 kappa (u_j - m))
  Real su;     // sum_j u_j
  Real top;    // max_j of x_j, or of -x_j for a negative scale; not of u_j, since u may round two logits to one value
  int64_t at;  // the first column with the value top; before the search, the first column of its segment
};

// RowMoments of unirl_kernels/backends, of a row or a shard: results of statistics, arguments of the backward.
template <class Real>
struct RowMoments {
  Real top;        // m
  Real s_minus_1;  // s - 1
  Real sz;         // in units of z: kappa times that of Moments
  Real u_target;   // -inf for a target that is ELSEWHERE
};

template <class Real>
struct Statistics {
  Real logp;
  Real entropy;
  Real lse;
};

template <class Real>
struct Observations {
  Real log_sum_sq_probs;  // log sum_j p_j^2
  Real mean_logit;        // mean of z_j
  Real largest;           // top of the row
  int64_t argmax;         // the first column of the largest; -1 if the sums of the row are NaN, and largest is NaN then
};

// Gradients of the loss with respect to a row's statistics.
template <class Real>
struct Coefficients {
  Real logp;
  Real entropy;
  Real lse;
};

// Arguments of the second sweep: dL/dx_j = e^(kappa d) (constant + linear d) du/dv with d = u_j - reference and
// v = gain x, except at the target.
template <class Real>
struct GradientTerms {
  Real reference;
  Real constant;
  Real linear;
  Real target;  // dL/dx_y
};

// softcap 0: none. A temperature that is not positive gives NaN everywhere.
template <class Real>
UNIRL_INLINE Readout<Real> make_readout(Real scale, Real softcap, Real temperature) {
  const Real inverse = temperature > 0 ? 1 / temperature : Real(NAN);
  if (softcap > 0) return {scale / softcap, softcap * inverse, true};
  return {scale < 0 ? Real(-1) : Real(1), fabs(scale) * inverse, false};
}

template <class Real>
UNIRL_INLINE Real to_u(const Readout<Real>& readout, Real x) {
  const Real v = readout.gain * x;
  return readout.capped ? tanh(v) : v;
}

// dz/dx. With a softcap 1 - tanh^2 = 4 w / (1 + w)^2, w = e^(-2|v|), which does not cancel where tanh saturates.
template <class Real>
UNIRL_INLINE Real slope(const Readout<Real>& readout, Real x) {
  const Real linear = readout.kappa * readout.gain;
  if (!readout.capped) return linear;
  const Real w = exp(-2 * fabs(readout.gain * x));
  return linear * 4 * w / ((1 + w) * (1 + w));
}

// Moments of the union of two parts. Merging in a fixed order gives the same bits for any distribution of the work.
template <class Real>
UNIRL_INLINE Moments<Real> merge(const Moments<Real>& a, const Moments<Real>& b, Real kappa) {
  // A part with only -inf logits has no weight, and no finite maximum to shift by.
  if (b.s == 0) return a;
  if (a.s == 0) return b;
  if (b.m > a.m) {
    const Real shift = a.m - b.m;
    const Real w = exp(kappa * shift);
    return {b.m, b.s + w * a.s, b.sz + w * (a.sz + a.s * shift)};
  }
  const Real shift = b.m - a.m;
  const Real w = exp(kappa * shift);
  return {a.m, a.s + w * b.s, a.sz + w * (b.sz + b.s * shift)};
}

// Observations of the union of two parts; a comes first in the row.
template <class Real>
UNIRL_INLINE Observed<Real> merge(const Observed<Real>& a, const Observed<Real>& b, Real kappa) {
  const Moments<Real>& first = a;
  const Moments<Real>& second = b;
  const Moments<Real> both = merge(first, second, kappa);
  // A part with only -inf logits has no weight, as in merge of moments.
  const Real w_a = a.s == 0 ? Real(0) : exp(2 * kappa * (a.m - both.m));
  const Real w_b = b.s == 0 ? Real(0) : exp(2 * kappa * (b.m - both.m));
  const bool later = b.top > a.top;
  return {both, w_a * a.s2 + w_b * b.s2, a.su + b.su, later ? b.top : a.top, later ? b.at : a.at};
}

template <class Real>
UNIRL_INLINE RowMoments<Real> row_moments(const Moments<Real>& row, const Readout<Real>& readout, Real u_target) {
  // The search for the largest logit may skip NaN; the sums do not.
  return {row.s != row.s ? Real(NAN) : row.m, row.s - 1, readout.kappa * row.sz, u_target};
}

// Statistics of a row; log_s: log1p(s - 1). The entropy is relative to the maximum: the two terms of H = log s - sz / s
// have the same sign, so nothing cancels. With a softcap the sweeps may round u of a logit differently, so without the
// bounds logp could be slightly above 0 and H slightly below 0. NaN stays NaN.
template <class Real>
UNIRL_INLINE Statistics<Real> finish(const RowMoments<Real>& row, Real kappa, Real log_s) {
  const Real logp = kappa * (row.u_target - row.top) - log_s, entropy = log_s - row.sz / (1 + row.s_minus_1);
  return {logp > 0 ? Real(0) : logp, entropy < 0 ? Real(0) : entropy, kappa * row.top + log_s};
}

// Observations of a row of vocab logits, from the merged observations of its segments.
template <class Real>
UNIRL_INLINE Observations<Real> observe(const Observed<Real>& row, const Readout<Real>& readout, int64_t vocab) {
  const bool broken = row.s != row.s;
  const Real log_sum_sq = log1p(row.s2 - 1) - 2 * log1p(row.s - 1);
  return {
      log_sum_sq > 0 ? Real(0) : log_sum_sq,
      readout.kappa * (row.su / vocab),
      broken ? Real(NAN) : row.top,
      broken ? -1 : row.at,
  };
}

// Terms of the gradient of a row whose largest u is finite. They are relative to the largest u, where log p is -log s.
// They do not use lse: for large logits its rounding would lose log s. at: the row's statistics; log_s: log1p(s - 1).
template <class Real>
UNIRL_INLINE GradientTerms<Real> gradient_terms(
    const Statistics<Real>& at,
    const Coefficients<Real>& d,
    const Readout<Real>& readout,
    Real top,
    Real log_s,
    Real x_target) {
  // Exact zeros for any logits, so that NaN in a row without gradient does not reach the sums of other rows.
  if (d.logp == 0 && d.entropy == 0 && d.lse == 0) return {};
  const Real factor = exp(-log_s) * readout.kappa * readout.gain;
  GradientTerms<Real> terms;
  terms.reference = top;
  terms.constant = factor * ((d.lse - d.logp) - (d.entropy == 0 ? Real(0) : d.entropy * (at.entropy - log_s)));
  terms.linear = d.entropy == 0 ? Real(0) : -factor * d.entropy * readout.kappa;
  // expm1 keeps the relative accuracy of 1 - p_y near p_y = 1. If p_y underflows, p log p is 0.
  const Real p = exp(at.logp);
  Real target = d.logp * -expm1(at.logp);
  if (p != 0) target += p * (d.lse - (d.entropy == 0 ? Real(0) : d.entropy * (at.logp + at.entropy)));
  terms.target = target * slope(readout, x_target);
  return terms;
}

}  // namespace unirl
