#include "cluster_rows.h"

namespace unirl::cuda {
namespace {

struct Measure {
  static constexpr bool READS = true, WRITES = false;
  StatisticsColumns out;

  __device__ void prepare(float*) const {}

  __device__ GradientTerms<float> operator()(
      int64_t row,
      bool leads,
      const Readout<double>& readout,
      const Moments<double>& moments,
      const Target& target,
      float*) const {
    if (leads) {
      const Statistics<double> statistics = finish(moments, readout, static_cast<double>(target.u));
      out.logp[row] = static_cast<float>(statistics.logp);
      out.entropy[row] = static_cast<float>(statistics.entropy);
      out.lse[row] = static_cast<float>(statistics.lse);
    }
    return {};
  }

  __device__ void absent(int64_t row, float value) const {
    out.logp[row] = value;
    out.entropy[row] = value;
    out.lse[row] = value;
  }
};

}  // namespace

std::string token_stats(const Rows& rows, const StatisticsColumns& out, cudaStream_t stream) {
  return launch(rows, {}, Measure{out}, stream);
}

}  // namespace unirl::cuda
