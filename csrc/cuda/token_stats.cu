#include "launch.h"

namespace unirl::cuda {
namespace {

struct Measure {
  static constexpr bool READS = true, WRITES = false;
  MeasuredColumns out;

  __device__ void prepare(int64_t, Exchange&) const {}

  __device__ GradientTerms<float> operator()(
      int64_t row, bool leads, const Moments<double>& sums, const Target& target, Exchange& exchange) const {
    if (leads) {
      const Readout<double>& readout = exchange.readout;
      const RowMoments<double> moments = row_moments(sums, readout, static_cast<double>(target.u));
      cuda::set(out.statistics, row, rounded(finish(moments, readout.kappa, log1p(moments.s_minus_1))));
      set(row, static_cast<float>(moments.top), static_cast<float>(moments.s_minus_1), static_cast<float>(moments.sz),
          target.u);
    }
    return {};
  }

  __device__ void absent(int64_t row, float value) const {
    cuda::set(out.statistics, row, {value, value, value});
    set(row, value, value, value, value);
  }

  __device__ void set(int64_t row, float top, float s_minus_1, float sz, float u_target) const {
    out.moments.top[row] = top;
    out.moments.s_minus_1[row] = s_minus_1;
    out.moments.sz[row] = sz;
    out.moments.u_target[row] = u_target;
  }
};

}  // namespace

std::string token_stats(const Rows& rows, const MeasuredColumns& out, cudaStream_t stream) {
  return launch(rows, {}, Measure{out}, stream);
}

}  // namespace unirl::cuda
