#include "cluster_rows.h"

namespace unirl::cuda {
namespace {

struct Fuse {
  static constexpr bool READS = true, WRITES = true;
  FieldColumns fields;
  FusedColumns out;
  const double* params;
  Program program;

  __device__ void prepare(float* registers) const {
    const int i = threadIdx.x;
    if (i < program.n_params) registers[N_INPUTS + i] = static_cast<float>(params[i]);
  }

  __device__ GradientTerms<float> operator()(
      int64_t row,
      bool leads,
      const Readout<double>& readout,
      const Moments<double>& moments,
      const Target& target,
      float* registers) const {
    const Statistics<double> statistics = finish(moments, readout, static_cast<double>(target.u));
    // The program sees the statistics as they are returned, rounded: given back as old_logp they make a ratio of
    // exactly 1.
    const float logp = static_cast<float>(statistics.logp), entropy = static_cast<float>(statistics.entropy);
    registers[LOGP] = logp;
    registers[ENTROPY] = entropy;
    registers[LSE] = static_cast<float>(statistics.lse);
    registers[OLD_LOGP] = fields.old_logp == nullptr ? logp : fields.old_logp[row];
    registers[REF_LOGP] = fields.ref_logp == nullptr ? 0 : fields.ref_logp[row];
    registers[ADVANTAGE] = fields.advantage == nullptr ? 0 : fields.advantage[row];
    float outputs[N_OUTPUTS];
    run_instructions(program, registers, outputs);
    const float weight = fields.weight[row];
    if (leads) set(row, weight * outputs[0], logp, entropy);
    const Coefficients<float> d = {weight * outputs[1], weight * outputs[2], weight * outputs[3]};
    return terms_at(anchor_of(moments), statistics, d, readout, target.x);
  }

  __device__ void absent(int64_t row, float value) const { set(row, value, value, value); }

  __device__ void set(int64_t row, float loss, float logp, float entropy) const {
    out.loss[row] = loss;
    out.logp[row] = logp;
    out.entropy[row] = entropy;
  }
};

}  // namespace

std::string fused_loss(
    const Rows& rows,
    const FieldColumns& fields,
    const Program& program,
    const double* params,
    const Matrix& d_logits,
    const FusedColumns& out,
    cudaStream_t stream) {
  return launch(rows, d_logits, Fuse{fields, out, params, program}, stream);
}

}  // namespace unirl::cuda
