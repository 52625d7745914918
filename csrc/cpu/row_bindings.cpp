#include "../row_bindings.h"
#include "bindings.h"
#include "rows.h"

namespace unirl {
namespace {

struct Cpu {
  using Rows = cpu::Rows;
  using Matrix = cpu::Matrix;
  using Column = cpu::Column;
  using StatisticsColumns = cpu::StatisticsColumns;
  using MomentColumns = cpu::MomentColumns;
  using MeasuredColumns = cpu::MeasuredColumns;
  using GradientColumns = cpu::StatisticsColumns;
  using ProgramInputs = cpu::ProgramInputs;
  using FusedColumns = cpu::FusedColumns;
  static constexpr auto token_stats = &cpu::token_stats;
  static constexpr auto token_stats_backward = &cpu::token_stats_backward;
  static constexpr auto fused_loss = &cpu::fused_loss;

  static Dtype row_dtype(const Tensor& logits) { return logits.dtype() == DOUBLE ? DOUBLE : FLOAT; }

  static Matrix matrix(const Tensor& x, const Tensor& logits, const char* name) {
    require_dense(logits, "logits");
    require(logits.is_cpu(), "logits must be on the cpu, got ", logits.device());
    require_rows(x, logits, name);
    require(x.dtype() == logits.dtype(), name, " must be ", logits.dtype(), " like logits, got ", x.dtype());
    return {x.data_ptr(), x.stride(0), x.stride(1)};
  }

  static Column column(const OptionalTensor& x, const Tensor& logits, const char* name) {
    if (!x) return {};
    require_per_row(*x, logits, row_dtype(logits), name);
    return {x->data_ptr(), row_dtype(logits) == DOUBLE};
  }

  static Column fields(const Tensor& x) { return {x.data_ptr(), x.dtype() == DOUBLE}; }

  static Rows rows(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout) {
    const Matrix of = matrix(logits, logits, "logits");
    const cpu::Format format = cpu::format_of(logits.dtype());
    Rows rows = rows_without_logits<Rows>(logits, target, ignore, readout, column);
    rows.format = format;
    rows.logits = of;
    return rows;
  }

  template <class Work>
  static void run(const Tensor&, const Work& work) {
    const WithoutGil no_gil;
    work();
  }
};

void token_observations(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                        const ObservedArgs& out) {
  const auto& [stats, moments, observations] = out;
  const auto& [log_sum_sq_probs, mean_logit, largest, argmax] = observations;
  const cpu::Rows of = Cpu::rows(logits, target, ignore, readout);
  const cpu::MeasuredColumns to = {RowBindings<Cpu>::statistics(stats, logits),
                                   RowBindings<Cpu>::moments_of(moments, logits)};
  require_per_row(argmax, logits, LONG, "argmax");
  const cpu::ObservationColumns observed = {
      Cpu::column(log_sum_sq_probs, logits, "log_sum_sq_probs"), Cpu::column(mean_logit, logits, "mean_logit"),
      Cpu::column(largest, logits, "largest"), argmax.data_ptr<int64_t>()};
  const WithoutGil no_gil;
  cpu::token_observations(of, to, observed);
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
  RowBindings<Cpu>::bind(m);
  m.def("token_observations", &unirl::token_observations, py::arg("logits"), py::arg("target"), py::arg("ignore"),
        py::arg("readout"), py::arg("out"));
}

}  // namespace unirl
