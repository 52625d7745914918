// The functions of unirl_kernels._cuda: they check what memory safety needs, unwrap tensors and launch kernels.
#include "../arguments.h"
#include "bindings.h"
#include "rows.h"

namespace unirl {
namespace {

using cuda::Format;
using cuda::GradientColumns;
using cuda::Matrix;
using cuda::MomentColumns;
using cuda::Rows;
using cuda::StatisticsColumns;

// Throws what a launch reports.
void check(const std::string& failure) {
  if (!failure.empty()) throw std::runtime_error(failure);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// The tensor's device is the current one as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : stream(static_cast<cudaStream_t>(current_stream(x.device()))) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(x.device().index));
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaSetDevice(before_); }

  const cudaStream_t stream;  // torch's current one

 private:
  int before_ = 0;
};

Format format_of(const Tensor& x) {
  const Dtype dtype = x.dtype();
  if (dtype == FLOAT) return Format::FP32;
  if (dtype == BFLOAT16) return Format::BF16;
  if (dtype == HALF) return Format::FP16;
  throw std::invalid_argument("logits of backend 'cuda' must be float32, bfloat16 or float16, got " + name_of(dtype) +
                              "; Plan(backend='eager') takes float64");
}

Matrix matrix(const Tensor& x, const Tensor& logits, const char* name) {
  require_dense(logits, "logits");
  require(logits.is_cuda(), "logits must be on a CUDA device, got ", logits.device());
  require_rows(x, logits, name);
  const bool rounded = x.dtype() == BFLOAT16 && logits.dtype() == FLOAT;
  require(rounded || x.dtype() == logits.dtype(), name, " must be ", logits.dtype(),
          " like logits, or BFloat16 for Float, got ", x.dtype());
  return {x.data_ptr(), x.stride(0), x.stride(1), format_of(x)};
}

float* column(const OptionalTensor& x, const Tensor& logits, const char* name) {
  if (!x) return nullptr;
  require_per_row(*x, logits, FLOAT, name);
  return x->data_ptr<float>();
}

Rows rows(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout) {
  const Matrix of = matrix(logits, logits, "logits");
  Rows rows = rows_without_logits<Rows>(logits, target, ignore, readout, column);
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
  const cuda::MeasuredColumns to = {statistics(stats, logits), moments_of(moments, logits)};
  const OnDevice on(logits);
  check(cuda::token_stats(of, to, on.stream));
}

void token_stats_backward(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                          const RowMomentsArgs& moments, const RowGradients& gradients, const Tensor& d_logits) {
  const auto& [d_logp, d_entropy, d_lse] = gradients;
  const Rows of = rows(logits, target, ignore, readout);
  const MomentColumns at = moments_of(moments, logits);
  const GradientColumns d = {column(d_logp, logits, "d_logp"), column(d_entropy, logits, "d_entropy"),
                             column(d_lse, logits, "d_lse")};
  require_storages(gradients);
  const Matrix to = matrix(d_logits, logits, "d_logits");
  const OnDevice on(logits);
  check(cuda::token_stats_backward(of, at, d, to, on.stream));
}

void fused_loss(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                const ProgramArgs& program_args, const Tensor& d_logits, const FusedRows& out) {
  const auto& [text, fields, params] = program_args;
  const auto& [loss, logp, entropy, lse] = out;
  const Rows of = rows(logits, target, ignore, readout);
  const std::shared_ptr<const Program> program = program_of(program_args, logits, FLOAT);
  const cuda::ProgramInputs from = {*program, fields.data_ptr<float>(), params.data_ptr<double>()};
  const cuda::FusedColumns to = {column(loss, logits, "loss"), statistics({logp, entropy, lse}, logits)};
  const Matrix gradient = matrix(d_logits, logits, "d_logits");
  const OnDevice on(logits);
  check(cuda::fused_loss(of, from, gradient, to, on.stream));
}

void scale_(const Tensor& x, const Tensor& factor) {
  require_dense(factor, "factor");
  require_dense(x, "x");
  require(factor.dtype() == FLOAT && factor.numel() == 1 && factor.device() == x.device(),
          "factor must be one float32 number on ", x.device(), ", got ", factor.dtype(), " ", factor.sizes(),
          " on ", factor.device());
  require_memory(factor, "factor");
  const Matrix of = matrix(x, x, "x");
  const OnDevice on(x);
  check(cuda::scale(of, x.size(0), x.size(1), x.size(2), factor.data_ptr<float>(), on.stream));
}

}  // namespace

void cuda::bind(pybind11::module_& m) {
  m.def("token_stats", &unirl::token_stats, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
        py::arg("out"));
  m.def("token_stats_backward", &unirl::token_stats_backward, py::arg("logits"), py::arg("target"), py::arg("ignore"),
        py::arg("readout"), py::arg("moments"), py::arg("gradients"), py::arg("d_logits"));
  m.def("fused_loss", &unirl::fused_loss, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
        py::arg("program"), py::arg("d_logits"), py::arg("out"));
  m.def("scale_", &unirl::scale_, py::arg("x"), py::arg("factor"));
}

}  // namespace unirl
