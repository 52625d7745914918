// The two sweeps in double, for gradcheck and the oracle: plain loops, since speed does not matter.
#include <cmath>

#include "segment.h"

namespace unirl::cpu {
namespace {

// Compensated sum (Neumaier). A plain sum of 8192 numbers in order has ten times the error of eager PyTorch.
class Sum {
 public:
  void add(double x) {
    const double next = total + x;
    lost += fabs(total) >= fabs(x) ? (total - next) + x : (x - next) + total;
    total = next;
  }
  // Infinities need no correction.
  double value() const { return std::isfinite(total) ? total + lost : total; }

 private:
  double total = 0, lost = 0;
};

Moments<double> moments(const void* from, int64_t n, const Readout<double>& readout) {
  const auto* x = static_cast<const double*>(from);
  double m = -INFINITY;
  for (int64_t i = 0; i < n; ++i) m = fmax(m, to_u(readout, x[i]));
  const double reference = m == -INFINITY ? 0 : m;
  Sum s, sz;
  for (int64_t i = 0; i < n; ++i) {
    const double d = to_u(readout, x[i]) - reference;
    const double e = exp(readout.kappa * d);
    s.add(e);
    if (e != 0) sz.add(e * d);
  }
  return {m, s.value(), sz.value()};
}

Observed<double> observe(const void* from, int64_t n, const Readout<double>& readout) {
  const auto* x = static_cast<const double*>(from);
  Observed<double> of = {moments(from, n, readout), 0, 0, -INFINITY, 0};
  const double reference = of.m == -INFINITY ? 0 : of.m;
  Sum s2, su;
  for (int64_t i = 0; i < n; ++i) {
    const double u = to_u(readout, x[i]);
    s2.add(exp(2 * readout.kappa * (u - reference)));
    su.add(u);
    of.top = fmax(of.top, readout.gain < 0 ? -x[i] : x[i]);
  }
  of.s2 = s2.value();
  of.su = su.value();
  return of;
}

int64_t find(const void* from, int64_t n, double top, const Readout<double>& readout) {
  const auto* x = static_cast<const double*>(from);
  int64_t i = 0;
  while (i < n && (readout.gain < 0 ? -x[i] : x[i]) != top) ++i;
  return i;
}

void gradient(
    const void* from, void* to, int64_t n, const Readout<double>& readout, const GradientTerms<double>& terms) {
  const auto* x = static_cast<const double*>(from);
  auto* d_x = static_cast<double*>(to);
  const double linear_slope = readout.kappa * readout.gain;
  for (int64_t i = 0; i < n; ++i) {
    const double d = to_u(readout, x[i]) - terms.reference;
    const double e = exp(readout.kappa * d);
    const double factor = terms.constant + (e != 0 ? terms.linear * d : 0);
    d_x[i] = e * factor * (slope(readout, x[i]) / linear_slope);
  }
}

double read(const void* x) { return *static_cast<const double*>(x); }

double u(const void* x, const Readout<double>& readout) { return to_u(readout, read(x)); }

void write(void* x, double value) { *static_cast<double*>(x) = value; }

}  // namespace

const SegmentKernels fp64_kernels = {moments, observe, find, gradient, nullptr, nullptr, read, u, write, sizeof(double)};

}  // namespace unirl::cpu
