// The CUDA functions of unirl_kernels._C: checks what memory safety needs, unwraps tensors, launches kernels.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../arguments.h"
#include "../program_code.h"
#include "rows.h"

namespace unirl {
namespace {

using at::Tensor;
using c10::cuda::CUDAGuard;
using c10::cuda::getCurrentCUDAStream;
using cuda::Format;
using cuda::GradientColumns;
using cuda::Matrix;
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
  require(x.is_cuda() && x.device() == logits.device(), name, " must be on the CUDA device of logits, ",
          logits.device(), ", got ", x.device());
  require(x.dim() == 3 && x.size(2) >= 1, name, " must have shape [B, L, V] with V >= 1, got ", x.sizes());
  require(x.sizes() == logits.sizes(), name, " must have shape ", logits.sizes(), " like logits, got ", x.sizes());
  const bool rounded = x.scalar_type() == at::kBFloat16 && logits.scalar_type() == at::kFloat;
  require(rounded || x.scalar_type() == logits.scalar_type(), name, " must be ", logits.scalar_type(),
          " like logits, or BFloat16 for Float, got ", x.scalar_type());
  require(x.size(2) == 1 || x.stride(2) == 1, name, " must have stride 1 in its last dimension, got ", x.stride(2));
  return {x.data_ptr(), x.stride(0), x.stride(1), format_of(x)};
}

void require_per_row(const Tensor& x, const Tensor& logits, at::ScalarType dtype, const char* name) {
  require(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
  require(x.device() == logits.device() && x.is_contiguous() && x.numel() == logits.size(0) * logits.size(1), name,
          " must be contiguous on ", logits.device(), " with a value per row of logits ", logits.sizes(), ", got ",
          x.sizes(), " on ", x.device());
}

float* column(const OptionalTensor& x, const Tensor& logits, const char* name) {
  if (!x) return nullptr;
  require_per_row(*x, logits, at::kFloat, name);
  return x->data_ptr<float>();
}

Rows rows(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout) {
  const auto& [scale, softcap, temperature, row_temperature] = readout;
  Rows rows;
  rows.logits = matrix(logits, logits, "logits");
  rows.batch = logits.size(0);
  rows.length = logits.size(1);
  rows.vocab = logits.size(2);
  require_per_row(target, logits, at::kLong, "target");
  rows.target = target.data_ptr<int64_t>();
  rows.ignore = ignore;
  rows.scale = scale;
  rows.softcap = softcap.value_or(0);
  rows.temperature = temperature;
  rows.row_temperature = column(row_temperature, logits, "row_temperature");
  return rows;
}

StatisticsColumns statistics(const RowStats& stats, const Tensor& logits) {
  const auto& [logp, entropy, lse] = stats;
  return {column(logp, logits, "logp"), column(entropy, logits, "entropy"), column(lse, logits, "lse")};
}

void token_stats(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                 const RowStats& out) {
  const Rows of = rows(logits, target, ignore, readout);
  const StatisticsColumns to = statistics(out, logits);
  const CUDAGuard guard(logits.device());
  check(cuda::token_stats(of, to, getCurrentCUDAStream()));
}

void token_stats_backward(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                          const RowStats& stats, const RowGradients& gradients, const Tensor& d_logits) {
  const auto& [d_logp, d_entropy, d_lse] = gradients;
  const Rows of = rows(logits, target, ignore, readout);
  const StatisticsColumns at = statistics(stats, logits);
  const GradientColumns d = {column(d_logp, logits, "d_logp"), column(d_entropy, logits, "d_entropy"),
                             column(d_lse, logits, "d_lse")};
  const Matrix to = matrix(d_logits, logits, "d_logits");
  const CUDAGuard guard(logits.device());
  check(cuda::token_stats_backward(of, at, d, to, getCurrentCUDAStream()));
}

void fused_loss(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                const RowFields& fields, const std::vector<int64_t>& code, const Tensor& params,
                const Tensor& d_logits, const FusedRows& out) {
  const auto& [weight, advantage, old_logp, ref_logp] = fields;
  const auto& [loss, logp, entropy] = out;
  const Rows of = rows(logits, target, ignore, readout);
  require(params.scalar_type() == at::kDouble && params.dim() == 1 && params.is_contiguous() &&
              params.device() == logits.device(),
          "params must be a contiguous float64 vector on ", logits.device(), ", got ", params.scalar_type(), " ",
          params.sizes(), " on ", params.device());
  const Program program = decode_program(code, params.numel());
  require(ref_logp || !reads_input(program, REF_LOGP), "ref_logp must be given: the objective reads it");
  require(advantage || !reads_input(program, ADVANTAGE), "advantage must be given: the objective reads it");
  const cuda::FieldColumns from = {column(weight, logits, "weight"), column(advantage, logits, "advantage"),
                                   column(old_logp, logits, "old_logp"), column(ref_logp, logits, "ref_logp")};
  const cuda::FusedColumns to = {column(loss, logits, "loss"), column(logp, logits, "logp"),
                                 column(entropy, logits, "entropy")};
  const Matrix gradient = matrix(d_logits, logits, "d_logits");
  const CUDAGuard guard(logits.device());
  check(cuda::fused_loss(of, from, program, params.data_ptr<double>(), gradient, to, getCurrentCUDAStream()));
}

void scale_(const Tensor& x, const Tensor& factor) {
  require(factor.scalar_type() == at::kFloat && factor.numel() == 1 && factor.device() == x.device(),
          "factor must be one float32 number on ", x.device(), ", got ", factor.scalar_type(), " ", factor.sizes(),
          " on ", factor.device());
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
        py::arg("readout"), py::arg("stats"), py::arg("gradients"), py::arg("d_logits"));
  m.def("fused_loss", &fused_loss, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
        py::arg("fields"), py::arg("code"), py::arg("params"), py::arg("d_logits"), py::arg("out"));
  m.def("scale_", &scale_, py::arg("x"), py::arg("factor"));
}

}  // namespace unirl
