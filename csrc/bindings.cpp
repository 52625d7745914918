// unirl_kernels._C: checks what memory safety needs, unwraps tensors, calls the kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/utils/pybind.h>

#include "arguments.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/products.h"
#include "cpu/rows.h"

namespace {

namespace cpu = unirl::cpu;
using at::Tensor;
using cpu::Column;
using cpu::Format;
using cpu::Matrix;
using unirl::FusedRows;
using unirl::OptionalTensor;
using unirl::ReadoutArgs;
using unirl::RowFields;
using unirl::RowGradients;
using unirl::RowObservations;
using unirl::RowStats;
using unirl::require;
using unirl::require_per_row;

Format format_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return Format::FP32;
    case at::kBFloat16: return Format::BF16;
    case at::kHalf: return Format::FP16;
    case at::kDouble: return Format::FP64;
    default: break;
  }
  throw std::invalid_argument("logits must be float32, bfloat16, float16 or float64, got " +
                              std::string(c10::toString(dtype)));
}

Matrix matrix(const Tensor& x, const Tensor& logits, const char* name) {
  require(logits.is_cpu(), "logits must be on the cpu, got ", logits.device());
  unirl::require_rows(x, logits, name);
  require(x.scalar_type() == logits.scalar_type(), name, " must be ", logits.scalar_type(), " like logits, got ",
          x.scalar_type());
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

Column column(const OptionalTensor& x, const Tensor& logits, const char* name) {
  if (!x) return {};
  const bool fp64 = logits.scalar_type() == at::kDouble;
  require_per_row(*x, logits, fp64 ? at::kDouble : at::kFloat, name);
  return {x->data_ptr(), fp64};
}

cpu::Rows rows(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout) {
  const Format format = format_of(logits.scalar_type());
  const Matrix of = matrix(logits, logits, "logits");
  cpu::Rows rows = unirl::rows_without_logits<cpu::Rows>(logits, target, ignore, readout, column);
  rows.format = format;
  rows.logits = of;
  return rows;
}

cpu::StatisticsColumns statistics(const RowStats& stats, const Tensor& logits) {
  const auto& [logp, entropy, lse] = stats;
  return {column(logp, logits, "logp"), column(entropy, logits, "entropy"), column(lse, logits, "lse")};
}

void token_stats(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                 const RowStats& out) {
  const cpu::Rows of = rows(logits, target, ignore, readout);
  const cpu::StatisticsColumns to = statistics(out, logits);
  const py::gil_scoped_release no_gil;
  cpu::token_stats(of, to);
}

void token_observations(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                        const RowObservations& out) {
  const auto& [logp, entropy, lse, log_sum_sq_probs, mean_logit, largest, argmax] = out;
  const cpu::Rows of = rows(logits, target, ignore, readout);
  require_per_row(argmax, logits, at::kLong, "argmax");
  const cpu::ObservationColumns to = {
      statistics({logp, entropy, lse}, logits), column(log_sum_sq_probs, logits, "log_sum_sq_probs"),
      column(mean_logit, logits, "mean_logit"), column(largest, logits, "largest"), argmax.data_ptr<int64_t>()};
  const py::gil_scoped_release no_gil;
  cpu::token_observations(of, to);
}

void token_stats_backward(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                          const RowStats& stats, const RowGradients& gradients, const Tensor& d_logits) {
  const auto& [d_logp, d_entropy, d_lse] = gradients;
  const cpu::Rows of = rows(logits, target, ignore, readout);
  const cpu::StatisticsColumns at = statistics(stats, logits);
  const cpu::StatisticsColumns d = {column(d_logp, logits, "d_logp"), column(d_entropy, logits, "d_entropy"),
                               column(d_lse, logits, "d_lse")};
  const Matrix to = matrix(d_logits, logits, "d_logits");
  const py::gil_scoped_release no_gil;
  cpu::token_stats_backward(of, at, d, to);
}

void fused_loss(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout,
                const RowFields& fields, const std::vector<int64_t>& code, const Tensor& params,
                const Tensor& d_logits, const FusedRows& out) {
  const auto& [weight, advantage, old_logp, ref_logp] = fields;
  const auto& [loss, logp, entropy] = out;
  const cpu::Rows of = rows(logits, target, ignore, readout);
  const unirl::Program program = unirl::program_of(code, params, fields, logits);
  const cpu::FieldColumns from = {column(weight, logits, "weight"), column(advantage, logits, "advantage"),
                             column(old_logp, logits, "old_logp"), column(ref_logp, logits, "ref_logp")};
  const cpu::FusedColumns to = {column(loss, logits, "loss"), column(logp, logits, "logp"),
                           column(entropy, logits, "entropy")};
  const Matrix gradient = matrix(d_logits, logits, "d_logits");
  const double* const values = params.data_ptr<double>();
  const py::gil_scoped_release no_gil;
  cpu::fused_loss(of, from, program, values, gradient, to);
}

std::string products_unavailable(at::ScalarType dtype) {
  if (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) {
    return cpu::products_unavailable(format_of(dtype));
  }
  return "products take Float, BFloat16 or Half, not " + std::string(c10::toString(dtype));
}

std::string product_arithmetic(at::ScalarType dtype) {
  return cpu::multiplied_as(format_of(dtype)) == Format::BF16 ? "bf16" : "fp32";
}

void require_matrix(const Tensor& x, int64_t rows, int64_t columns, const char* shape, const char* name) {
  require(x.device().is_cpu() && x.layout() == at::kStrided, name, " must be a dense tensor on the cpu, got ",
          x.layout(), " on ", x.device());
  require(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name, " must have shape ", shape, " = [", rows,
          ", ", columns, "], got ", x.sizes());
}

void require_float(const Tensor& x, const char* name) {
  require(x.scalar_type() == at::kFloat, name, " must be Float, got ", x.scalar_type());
}

// A matrix that a product is written to.
void require_result(const Tensor& x, int64_t rows, int64_t columns, const char* shape, const char* name) {
  require_matrix(x, rows, columns, shape, name);
  require_float(x, name);
  require(columns <= 1 || x.stride(1) == 1, name, " must have stride 1 in its last dimension, got ", x.stride(1));
  require(rows <= 1 || x.stride(0) >= columns, name, " must have rows that do not overlap, got strides ", x.strides());
}

// The factor whose dtype decides how a product runs.
void require_factor(const Tensor& x, const char* name) {
  require(x.dim() == 2, name, " must have two dimensions, got ", x.sizes());
  const std::string reason = products_unavailable(x.scalar_type());
  require(reason.empty(), name, " must have a product on this machine: ", reason);
}

cpu::Slice slice(const Tensor& x, int64_t lanes, int64_t depth) {
  return {format_of(x.scalar_type()), x.data_ptr(), x.stride(lanes), x.stride(depth), x.size(lanes), x.size(depth)};
}

void multiply(const cpu::Slice& rows, const cpu::Slice& columns, const float* bias, bool add, const Tensor& result) {
  const cpu::Product product = {rows, columns, bias, add, result.data_ptr<float>(), result.stride(0)};
  const py::gil_scoped_release no_gil;
  cpu::multiply(product);
}

void logits_product(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& out) {
  require_factor(weight, "weight");
  require(hidden.dim() == 2, "hidden must have two dimensions, got ", hidden.sizes());
  const int64_t n = hidden.size(0), vocab = weight.size(0);
  require_matrix(weight, vocab, hidden.size(1), "[V, D]", "weight");
  require_matrix(hidden, n, weight.size(1), "[n, D]", "hidden");
  require(hidden.scalar_type() == weight.scalar_type(), "hidden must be ", weight.scalar_type(), " like weight, got ",
          hidden.scalar_type());
  require_result(out, n, vocab, "[n, V]", "out");
  if (bias) {
    require(bias->device().is_cpu() && bias->dim() == 1 && bias->size(0) == vocab && bias->is_contiguous(),
            "bias must be contiguous on the cpu with shape [V] = [", vocab, "], got ", bias->sizes(), " on ",
            bias->device());
    require_float(*bias, "bias");
  }
  multiply(slice(hidden, 0, 1), slice(weight, 0, 1), bias ? bias->data_ptr<float>() : nullptr, false, out);
}

void hidden_gradient_product(const Tensor& d_logits, const Tensor& weight, const Tensor& out) {
  require_factor(weight, "weight");
  require(d_logits.dim() == 2, "d_logits must have two dimensions, got ", d_logits.sizes());
  const int64_t n = d_logits.size(0);
  require_matrix(weight, d_logits.size(1), weight.size(1), "[V, D]", "weight");
  require_matrix(d_logits, n, weight.size(0), "[n, V]", "d_logits");
  require_float(d_logits, "d_logits");
  require_result(out, n, weight.size(1), "[n, D]", "out");
  multiply(slice(d_logits, 0, 1), slice(weight, 1, 0), nullptr, false, out);
}

void weight_gradient_product(const Tensor& d_logits, const Tensor& hidden, const Tensor& total, bool accumulate) {
  require_factor(hidden, "hidden");
  require(d_logits.dim() == 2, "d_logits must have two dimensions, got ", d_logits.sizes());
  const int64_t n = d_logits.size(0);
  require_matrix(hidden, n, hidden.size(1), "[n, D]", "hidden");
  require_matrix(d_logits, n, d_logits.size(1), "[n, V]", "d_logits");
  require_float(d_logits, "d_logits");
  require_result(total, d_logits.size(1), hidden.size(1), "[V, D]", "total");
  multiply(slice(d_logits, 1, 0), slice(hidden, 1, 0), nullptr, accumulate, total);
}

// Contiguous memory. What is smaller than a huge page comes from PyTorch's allocator.
Tensor empty(const std::vector<int64_t>& shape, at::ScalarType dtype) {
  constexpr size_t HUGE_PAGE = size_t(2) << 20;
  const size_t bytes = c10::multiply_integers(shape) * c10::elementSize(dtype);
  if (bytes < HUGE_PAGE) return at::empty(shape, dtype);
  const cpu::Block block = cpu::allocate(bytes);
  return at::from_blob(block.memory, shape, [block](void*) { cpu::release(block); }, dtype);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native kernels of unirl_kernels; use them through unirl_kernels.backends.cpu.";
  m.def("token_stats", &token_stats, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
        py::arg("out"));
  m.def("token_observations", &token_observations, py::arg("logits"), py::arg("target"), py::arg("ignore"),
        py::arg("readout"), py::arg("out"));
  m.def("token_stats_backward", &token_stats_backward, py::arg("logits"), py::arg("target"), py::arg("ignore"),
        py::arg("readout"), py::arg("stats"), py::arg("gradients"), py::arg("d_logits"));
  m.def("fused_loss", &fused_loss, py::arg("logits"), py::arg("target"), py::arg("ignore"), py::arg("readout"),
        py::arg("fields"), py::arg("code"), py::arg("params"), py::arg("d_logits"), py::arg("out"));
  m.def("logits_product", &logits_product, py::arg("hidden"), py::arg("weight"), py::arg("bias"), py::arg("out"));
  m.def("hidden_gradient_product", &hidden_gradient_product, py::arg("d_logits"), py::arg("weight"), py::arg("out"));
  m.def("weight_gradient_product", &weight_gradient_product, py::arg("d_logits"), py::arg("hidden"),
        py::arg("total"), py::arg("accumulate"));
  m.def("products_unavailable", &products_unavailable, py::arg("dtype"));
  m.def("product_arithmetic", &product_arithmetic, py::arg("dtype"));
  m.def("empty", &empty, py::arg("shape"), py::arg("dtype"));
  m.def("limit_kept_bytes", &cpu::limit_kept_bytes, py::arg("bytes"));
  m.def("kept_bytes", &cpu::kept_bytes);
  m.def("instruction_set", &cpu::instruction_set);
  m.def("compiled_instruction_sets", &cpu::compiled_instruction_sets);
  m.def("opcode_names", &unirl::opcode_names);
  m.attr("MAX_PARAMS") = unirl::MAX_PARAMS;
  m.attr("MAX_INSTRUCTIONS") = unirl::MAX_INSTRUCTIONS;
  m.attr("SEGMENT") = cpu::SEGMENT;
#ifdef UNIRL_WITH_CUDA
  unirl::bind_cuda(m);
#endif
}
