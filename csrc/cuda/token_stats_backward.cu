#include "cluster_rows.h"

namespace unirl::cuda {
namespace {

// The statistics are known; the blocks of a row tell one another only the target's logit, which the block that has it
// may overwrite.
struct Backward {
  static constexpr bool READS = false, WRITES = true;
  StatisticsColumns at;
  GradientColumns d;

  __device__ void prepare(float*) const {}

  __device__ GradientTerms<float> operator()(
      int64_t row,
      bool,
      const Readout<double>& readout,
      const Moments<double>&,
      const Target& target,
      float*) const {
    const Statistics<double> statistics = {at.logp[row], at.entropy[row], at.lse[row]};
    const Coefficients<float> coefficients = {value(d.logp, row), value(d.entropy, row), value(d.lse, row)};
    return terms_at(anchor_of(statistics, readout, target.u, false), statistics, coefficients, readout, target.x);
  }

  __device__ void absent(int64_t, float) const {}

  static __device__ float value(const float* column, int64_t row) { return column == nullptr ? 0 : column[row]; }
};

}  // namespace

std::string token_stats_backward(
    const Rows& rows,
    const StatisticsColumns& at,
    const GradientColumns& d,
    const Matrix& d_logits,
    cudaStream_t stream) {
  return launch(rows, d_logits, Backward{at, d}, stream);
}

}  // namespace unirl::cuda
