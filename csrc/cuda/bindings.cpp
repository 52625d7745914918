// The CUDA functions of unirl_kernels._C: checks what memory safety needs, unwraps tensors, launches kernels.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../arguments.h"
#include "rows.h"

namespace unirl {
namespace {

using at::Tensor;
using c10::cuda::CUDAGuard;
using c10::cuda::getCurrentCUDAStream;
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

Format format_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Format::FP32;
    case at::kBFloat16: return Format::BF16;
    case at::kHalf: return Format::FP16;
    default: break;
  }
  throw std::invalid_argument("logits of backend 'cuda' must be float32, bfloat16 or float16, got " +
                              std::string(c10::toString(x.scalar_type())) + "; Plan(backend='eager') takes float64");
}

Matrix matrix(const Tensor& x, const Tensor& logits, const char* name) {
  require(logits.is_cuda(), "logits must be on a CUDA device, got ", logits.device());
  require_rows(x, logits, name);
  const bool rounded = x.scalar_type() == at::kBFloat16 && logits.scalar_type() == at::kFloat;
  require(rounded || x.scalar_type() == logits.scalar_type(), name, " must be ", logits.scalar_type(),
          " like logits, or BFloat16 for Float, got ", x.scalar_type());
  return {x.data_ptr(), x.stride(0), x.stride(1), format_of(x)};
}

float* column(const OptionalTensor& x, const Tensor& logits, const char* name) {
  if (!x) return nullptr;
  require_per_row(*x, logits, at::kFloat, name);
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
  const CUDAGuard guard(logits.device());
  check(cuda::token_stats(of, to, getCurrentCUDAStream()));
}

void token_stats_backward(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                          const RowMomentsArgs& moments, const RowGradients& gradients, const Tensor& d_logits) {
  const auto& [d_logp, d_entropy, d_lse] = gradients;
  const Rows of = rows(logits, target, ignore, readout);
  const MomentColumns at = moments_of(moments, logits);
  const GradientColumns d = {column(d_logp, logits, "d_logp"), column(d_entropy, logits, "d_entropy"),
                             column(d_lse, logits, "d_lse")};
  const Matrix to = matrix(d_logits, logits, "d_logits");
  const CUDAGuard guard(logits.device());
  check(cuda::token_stats_backward(of, at, d, to, getCurrentCUDAStream()));
}

void fused_loss(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                const ProgramArgs& program_args, const Tensor& d_logits, const FusedRows& out) {
  const auto& [text, fields, params] = program_args;
  const auto& [loss, logp, entropy, lse] = out;
  const Rows of = rows(logits, target, ignore, readout);
  const std::shared_ptr<const Program> program = program_of(program_args, logits, at::kFloat);
  const cuda::ProgramInputs from = {*program, fields.data_ptr<float>(), params.data_ptr<double>()};
  const cuda::FusedColumns to = {column(loss, logits, "loss"), statistics({logp, entropy, lse}, logits)};
  const Matrix gradient = matrix(d_logits, logits, "d_logits");
  const CUDAGuard guard(logits.device());
  check(cuda::fused_loss(of, from, gradient, to, getCurrentCUDAStream()));
}

void scale_(const Tensor& x, const Tensor& factor) {
  require(factor.scalar_type() == at::kFloat && factor.numel() == 1 && factor.device() == x.device(),
          "factor must be one float32 number on ", x.device(), ", got ", factor.scalar_type(), " ", factor.sizes(),
          " on ", factor.device());
  require_memory(factor, "factor");
  const Matrix of = matrix(x, x, "x");
  const CUDAGuard guard(x.device());
  check(cuda::scale(of, x.size(0), x.size(1), x.size(2), factor.data_ptr<float>(), getCurrentCUDAStream()));
}

}  // namespace

void bind_cuda(pybind11::module_& parent) {
  pybind11::module_ m = parent.def_submodule("cuda", "Kernels for CUDA devices of compute capability 9.0 and newer.");
  m.def("token_stats", &token_stats, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
        py::arg("out"));
  m.def("token_stats_backward", &token_stats_backward, py::arg("logits"), py::arg("target"), py::arg("ignore"),
        py::arg("readout"), py::arg("moments"), py::arg("gradients"), py::arg("d_logits"));
  m.def("fused_loss", &fused_loss, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
        py::arg("program"), py::arg("d_logits"), py::arg("out"));
  m.def("scale_", &scale_, py::arg("x"), py::arg("factor"));
}

}  // namespace unirl
