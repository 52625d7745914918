#include "launch.h"

namespace unirl::cuda {
namespace {

// The moments are known. The blocks of a row exchange only the target's logit, since its block may overwrite it.
struct Backward {
  static constexpr bool READS = false, WRITES = true;
  MomentColumns of;
  GradientColumns d;

  __device__ void prepare(int64_t, Exchange&) const {}

  __device__ GradientTerms<float> operator()(
      int64_t row, bool, const Moments<double>&, const Target& target, Exchange& exchange) const {
    const Readout<double>& readout = exchange.readout;
    const RowMoments<double> moments = {of.top[row], of.s_minus_1[row], of.sz[row], of.u_target[row]};
    const double log_s = log1p(moments.s_minus_1);
    const Statistics<double> statistics = finish(moments, readout.kappa, log_s);
    const Coefficients<float> coefficients = {value(d.logp, row), value(d.entropy, row), value(d.lse, row)};
    return terms_at(statistics, coefficients, readout, moments.top, log_s, target.x);
  }

  __device__ void absent(int64_t, float) const {}

  static __device__ float value(const float* column, int64_t row) { return column == nullptr ? 0 : column[row]; }
};

}  // namespace

std::string token_stats_backward(
    const Rows& rows,
    const MomentColumns& moments,
    const GradientColumns& d,
    const Matrix& d_logits,
    cudaStream_t stream) {
  return launch(rows, d_logits, Backward{moments, d}, stream);
}

}  // namespace unirl::cuda
