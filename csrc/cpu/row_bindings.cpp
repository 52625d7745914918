#include "../arguments.h"
#include "bindings.h"
#include "rows.h"

namespace unirl {
namespace {

using cpu::Column;
using cpu::FusedColumns;
using cpu::Matrix;
using cpu::MeasuredColumns;
using cpu::MomentColumns;
using cpu::ObservationColumns;
using cpu::ProgramInputs;
using cpu::Rows;
using cpu::StatisticsColumns;

Matrix matrix(const Tensor& x, const Tensor& logits, const char* name) {
  require_dense(logits, "logits");
  require(logits.is_cpu(), "logits must be on the cpu, got ", logits.device());
  require_rows(x, logits, name);
  require(x.dtype() == logits.dtype(), name, " must be ", logits.dtype(), " like logits, got ", x.dtype());
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

Dtype row_dtype(const Tensor& logits) {
  return logits.dtype() == DOUBLE ? DOUBLE : FLOAT;
}

Column column(const OptionalTensor& x, const Tensor& logits, const char* name) {
  if (!x) return {};
  require_per_row(*x, logits, row_dtype(logits), name);
  return {x->data_ptr(), row_dtype(logits) == DOUBLE};
}

Rows rows(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout) {
  const cpu::Format format = cpu::format_of(logits.dtype());
  const Matrix of = matrix(logits, logits, "logits");
  Rows rows = rows_without_logits<Rows>(logits, target, ignore, readout, column);
  rows.format = format;
  rows.logits = of;
  return rows;
}

StatisticsColumns statistics(const RowStats& stats, const Tensor& logits) {
  const auto& [logp, entropy, lse] = stats;
  return {column(logp, logits, "logp"), column(entropy, logits, "entropy"), column(lse, logits, "lse")};
}

MomentColumns moments_of(const RowMomentsArgs& moments, const Tensor& logits) {
  const auto& [top, s_minus_1, sz, u_target] = moments;
  return {column(top, logits, "top"), column(s_minus_1, logits, "s_minus_1"), column(sz, logits, "sz"),
          column(u_target, logits, "u_target")};
}

void token_stats(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                 const Measured& out) {
  const auto& [stats, moments] = out;
  const Rows of = rows(logits, target, ignore, readout);
  const MeasuredColumns to = {statistics(stats, logits), moments_of(moments, logits)};
  const WithoutGil no_gil;
  cpu::token_stats(of, to);
}

void token_observations(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                        const ObservedArgs& out) {
  const auto& [stats, moments, observations] = out;
  const auto& [log_sum_sq_probs, mean_logit, largest, argmax] = observations;
  const Rows of = rows(logits, target, ignore, readout);
  const MeasuredColumns to = {statistics(stats, logits), moments_of(moments, logits)};
  require_per_row(argmax, logits, LONG, "argmax");
  const ObservationColumns observed = {
      column(log_sum_sq_probs, logits, "log_sum_sq_probs"), column(mean_logit, logits, "mean_logit"),
      column(largest, logits, "largest"), argmax.data_ptr<int64_t>()};
  const WithoutGil no_gil;
  cpu::token_observations(of, to, observed);
}

void token_stats_backward(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                          const RowMomentsArgs& moments, const RowGradients& gradients, const Tensor& d_logits) {
  const auto& [d_logp, d_entropy, d_lse] = gradients;
  const Rows of = rows(logits, target, ignore, readout);
  const MomentColumns at = moments_of(moments, logits);
  const StatisticsColumns d = {column(d_logp, logits, "d_logp"), column(d_entropy, logits, "d_entropy"),
                               column(d_lse, logits, "d_lse")};
  require_storages(gradients);
  const Matrix to = matrix(d_logits, logits, "d_logits");
  const WithoutGil no_gil;
  cpu::token_stats_backward(of, at, d, to);
}

void fused_loss(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                const ProgramArgs& program_args, const Tensor& d_logits, const FusedRows& out) {
  const auto& [text, fields, params] = program_args;
  const auto& [loss, logp, entropy, lse] = out;
  const Rows of = rows(logits, target, ignore, readout);
  const std::shared_ptr<const Program> program = program_of(program_args, logits, row_dtype(logits));
  const ProgramInputs from = {
      *program, {fields.data_ptr(), row_dtype(logits) == DOUBLE}, params.data_ptr<double>()};
  const FusedColumns to = {column(loss, logits, "loss"), statistics({logp, entropy, lse}, logits)};
  const Matrix gradient = matrix(d_logits, logits, "d_logits");
  const WithoutGil no_gil;
  cpu::fused_loss(of, from, gradient, to);
}

}  // namespace

cpu::Format cpu::format_of(Dtype dtype) {
  if (dtype == FLOAT) return Format::FP32;
  if (dtype == BFLOAT16) return Format::BF16;
  if (dtype == HALF) return Format::FP16;
  if (dtype == DOUBLE) return Format::FP64;
  throw std::invalid_argument("logits must be float32, bfloat16, float16 or float64, got " + name_of(dtype));
}

void cpu::bind_rows(pybind11::module_& m) {
  m.def("token_stats", &unirl::token_stats, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
        py::arg("out"));
  m.def("token_observations", &unirl::token_observations, py::arg("logits"), py::arg("target"), py::arg("ignore"),
        py::arg("readout"), py::arg("out"));
  m.def("token_stats_backward", &unirl::token_stats_backward, py::arg("logits"), py::arg("target"), py::arg("ignore"),
        py::arg("readout"), py::arg("moments"), py::arg("gradients"), py::arg("d_logits"));
  m.def("fused_loss", &unirl::fused_loss, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
        py::arg("program"), py::arg("d_logits"), py::arg("out"));
}

}  // namespace unirl
