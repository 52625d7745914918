#include "launch.h"

namespace unirl::cuda {
namespace {

struct Fuse {
  static constexpr bool READS = true, WRITES = true;
  const float* fields;
  const double* params;
  int64_t n_rows;
  FusedColumns out;
  Program program;

  __device__ void prepare(int64_t row, Exchange& exchange) const {
    const int i = threadIdx.x;
    if (i < program.n_fields) {
      __pipeline_memcpy_async(&exchange.inputs[FIRST_FIELD + i], &fields[i * n_rows + row], sizeof(float));
    }
  }

  __device__ GradientTerms<float> operator()(
      int64_t row, bool leads, const Moments<double>& sums, const Target& target, Exchange& exchange) const {
    const Readout<double>& readout = exchange.readout;
    const RowMoments<double> moments = row_moments(sums, readout, static_cast<double>(target.u));
    const double log_s = log1p(moments.s_minus_1);
    const Statistics<double> statistics = finish(moments, readout.kappa, log_s);
    // The program reads the returned, rounded statistics, so that logp passed as old_logp gives a ratio of exactly
    // 1.
    const Statistics<float> returned = rounded(statistics);
    exchange.inputs[LOGP] = returned.logp;
    exchange.inputs[ENTROPY] = returned.entropy;
    exchange.inputs[LSE] = returned.lse;
    const auto input = [&](int at) {
      return at < FIRST_PARAM ? exchange.inputs[at] : static_cast<float>(params[at - FIRST_PARAM]);
    };
    float* const outputs = exchange.outputs;
    run_program(program, input, exchange.results, outputs);
    if (leads) {
      out.loss[row] = outputs[0];
      set(out.statistics, row, returned);
    }
    return terms_at(statistics, {outputs[1], outputs[2], outputs[3]}, readout, moments.top, log_s, target.x);
  }

  __device__ void absent(int64_t row, float value) const {
    out.loss[row] = value;
    set(out.statistics, row, {value, value, value});
  }
};

static_assert(sizeof(Rows) + sizeof(Matrix) + sizeof(int) + sizeof(Fuse) <= 4096, "what every driver takes");

}  // namespace

std::string fused_loss(
    const Rows& rows,
    const ProgramInputs& inputs,
    const Matrix& d_logits,
    const FusedColumns& out,
    cudaStream_t stream) {
  const Fuse step = {inputs.fields, inputs.params, rows.batch * rows.length, out, inputs.program};
  return launch(rows, d_logits, step, stream);
}

}  // namespace unirl::cuda
