// The operations on rows that Python calls, written once for all backends: they check and unwrap the arguments, then
// run the operation of the backend. A Backend has the types and operations of its rows.h, and
//   rows(logits, target, ignore, readout)      its Rows
//   matrix(x, logits, name)                    its Matrix of a tensor shaped like the logits
//   column(x, logits, name)                    its Column of a value per row, of a tensor that may be missing
//   fields(x)                                  its Column of the program's fields
//   row_dtype(logits)                          of the values per row
//   run(logits, work)                          calls work with what operations take besides: a stream, or nothing
#pragma once

#include "arguments.h"

namespace unirl {

template <class Backend>
struct RowBindings {
  static typename Backend::StatisticsColumns statistics(const RowStats& stats, const Tensor& logits) {
    const auto& [logp, entropy, lse] = stats;
    return {Backend::column(logp, logits, "logp"), Backend::column(entropy, logits, "entropy"),
            Backend::column(lse, logits, "lse")};
  }

  static typename Backend::MomentColumns moments_of(const RowMomentsArgs& moments, const Tensor& logits) {
    const auto& [top, s_minus_1, sz, u_target] = moments;
    return {Backend::column(top, logits, "top"), Backend::column(s_minus_1, logits, "s_minus_1"),
            Backend::column(sz, logits, "sz"), Backend::column(u_target, logits, "u_target")};
  }

  static void token_stats(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                          const Measured& out) {
    const auto& [stats, moments] = out;
    const auto of = Backend::rows(logits, target, ignore, readout);
    const typename Backend::MeasuredColumns to = {statistics(stats, logits), moments_of(moments, logits)};
    Backend::run(logits, [&](auto... stream) { return Backend::token_stats(of, to, stream...); });
  }

  static void token_stats_backward(const Tensor& logits, const Tensor& target, int64_t ignore,
                                   const ReadoutArgs& readout, const RowMomentsArgs& moments,
                                   const RowGradients& gradients, const Tensor& d_logits) {
    const auto& [d_logp, d_entropy, d_lse] = gradients;
    const auto of = Backend::rows(logits, target, ignore, readout);
    const auto at = moments_of(moments, logits);
    const typename Backend::GradientColumns d = {Backend::column(d_logp, logits, "d_logp"),
                                                 Backend::column(d_entropy, logits, "d_entropy"),
                                                 Backend::column(d_lse, logits, "d_lse")};
    require_storages(gradients);
    const auto to = Backend::matrix(d_logits, logits, "d_logits");
    Backend::run(logits, [&](auto... stream) { return Backend::token_stats_backward(of, at, d, to, stream...); });
  }

  static void fused_loss(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                         const ProgramArgs& program_args, const Tensor& d_logits, const FusedRows& out) {
    const auto& [text, fields, params] = program_args;
    const auto& [loss, logp, entropy, lse] = out;
    const auto of = Backend::rows(logits, target, ignore, readout);
    const std::shared_ptr<const Program> program = program_of(program_args, logits, Backend::row_dtype(logits));
    const typename Backend::ProgramInputs from = {*program, Backend::fields(fields), params.data_ptr<double>()};
    const typename Backend::FusedColumns to = {Backend::column(loss, logits, "loss"),
                                               statistics({logp, entropy, lse}, logits)};
    const auto gradient = Backend::matrix(d_logits, logits, "d_logits");
    Backend::run(logits, [&](auto... stream) { return Backend::fused_loss(of, from, gradient, to, stream...); });
  }

  static void bind(py::module_& m) {
    m.def("token_stats", &token_stats, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
          py::arg("out"));
    m.def("token_stats_backward", &token_stats_backward, py::arg("logits"), py::arg("target"), py::arg("ignore"),
          py::arg("readout"), py::arg("moments"), py::arg("gradients"), py::arg("d_logits"));
    m.def("fused_loss", &fused_loss, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
          py::arg("program"), py::arg("d_logits"), py::arg("out"));
  }
};

}  // namespace unirl
