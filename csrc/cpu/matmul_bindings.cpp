#include "../arguments.h"
#include "bindings.h"
#include "dispatch.h"
#include "matmul.h"
#include "matmul_variants.h"

namespace unirl {
namespace {

using cpu::Format;
using cpu::Slice;
using cpu::format_of;

std::string matmuls_unavailable(Dtype dtype) {
  if (dtype == FLOAT || dtype == BFLOAT16 || dtype == HALF) {
    return cpu::matmuls_unavailable(format_of(dtype));
  }
  return "matmuls take Float, BFloat16 or Half, not " + name_of(dtype);
}

std::string matmul_arithmetic(Dtype dtype) {
  return cpu::multiplied_as(format_of(dtype)) == Format::BF16 ? "bf16" : "fp32";
}

std::string matmul_variant(Dtype dtype) {
  const std::string reason = matmuls_unavailable(dtype);
  require(reason.empty(), "dtype must be one that is multiplied on this machine: ", reason);
  return cpu::variant_of(format_of(dtype))->name;
}

void require_on_cpu(const Tensor& x, const char* name) {
  if (!x.is_cpu()) require(false, name, " must be a dense tensor on the cpu, got ", x.described());
}

void require_matrix(const Tensor& x, int64_t rows, int64_t columns, const char* shape, const char* name) {
  require_on_cpu(x, name);
  require(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name, " must have shape ", shape, " = [", rows,
          ", ", columns, "], got ", x.sizes());
  require_storage(x, name);
}

void require_float(const Tensor& x, const char* name) {
  require(x.dtype() == FLOAT, name, " must be Float, got ", x.dtype());
}

// A matrix that a matmul writes to.
void require_result(const Tensor& x, int64_t rows, int64_t columns, const char* shape, const char* name) {
  require_matrix(x, rows, columns, shape, name);
  require_float(x, name);
  require(columns <= 1 || x.stride(1) == 1, name, " must have stride 1 in its last dimension, got ", x.stride(1));
  require(rows <= 1 || x.stride(0) >= columns, name, " must have rows that do not overlap, got strides ", x.strides());
}

// The factor whose dtype decides how a matmul runs.
void require_factor(const Tensor& x, const char* name) {
  require_on_cpu(x, name);
  require(x.dim() == 2, name, " must have two dimensions, got ", x.sizes());
  const std::string reason = matmuls_unavailable(x.dtype());
  require(reason.empty(), name, " must have a dtype that is multiplied on this machine: ", reason);
}

// The bias in fp32; empty if there is none.
std::vector<float> checked_bias(const OptionalTensor& bias, int64_t vocab) {
  if (!bias) return {};
  require_dense(*bias, "bias");
  const Dtype dtype = bias->dtype();
  const bool floating = dtype == FLOAT || dtype == BFLOAT16 || dtype == HALF || dtype == DOUBLE;
  require(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == vocab && floating,
          "bias must be floating on the cpu with shape [V] = [", vocab, "], got ", dtype, " ", bias->sizes(), " on ",
          bias->device());
  require_storage(*bias, "bias");
  const cpu::SegmentKernels& kernels = cpu::kernels_for(format_of(dtype));
  const char* const from = bias->data_ptr<char>();
  std::vector<float> values(vocab);
  for (int64_t i = 0; i < vocab; ++i) {
    values[i] = static_cast<float>(kernels.read(from + i * bias->stride(0) * kernels.bytes));
  }
  return values;
}

Slice slice(const Tensor& x, int64_t lanes, int64_t depth) {
  return {format_of(x.dtype()), x.data_ptr(), x.stride(lanes), x.stride(depth), x.size(lanes), x.size(depth)};
}

void run(const Slice& rows, const Slice& columns, const float* bias, bool add, const Tensor& result) {
  const cpu::Matmul matmul = {rows, columns, bias, add, result.data_ptr<float>(), result.stride(0)};
  const WithoutGil no_gil;
  cpu::multiply(matmul);
}

void logits_matmul(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& out) {
  require_factor(weight, "weight");
  require_on_cpu(hidden, "hidden");
  require(hidden.dim() == 2, "hidden must have two dimensions, got ", hidden.sizes());
  const int64_t n = hidden.size(0), vocab = weight.size(0);
  require_matrix(weight, vocab, hidden.size(1), "[V, D]", "weight");
  require_matrix(hidden, n, weight.size(1), "[n, D]", "hidden");
  require(hidden.dtype() == weight.dtype(), "hidden must be ", weight.dtype(), " like weight, got ", hidden.dtype());
  require_result(out, n, vocab, "[n, V]", "out");
  const std::vector<float> added = checked_bias(bias, vocab);
  run(slice(hidden, 0, 1), slice(weight, 0, 1), bias ? added.data() : nullptr, false, out);
}

void d_hidden_matmul(const Tensor& d_logits, const Tensor& weight, const Tensor& out) {
  require_factor(weight, "weight");
  require_on_cpu(d_logits, "d_logits");
  require(d_logits.dim() == 2, "d_logits must have two dimensions, got ", d_logits.sizes());
  const int64_t n = d_logits.size(0);
  require_matrix(weight, d_logits.size(1), weight.size(1), "[V, D]", "weight");
  require_matrix(d_logits, n, weight.size(0), "[n, V]", "d_logits");
  require_float(d_logits, "d_logits");
  require_result(out, n, weight.size(1), "[n, D]", "out");
  run(slice(d_logits, 0, 1), slice(weight, 1, 0), nullptr, false, out);
}

void d_weight_matmul(const Tensor& d_logits, const Tensor& hidden, const Tensor& total, bool add) {
  require_factor(hidden, "hidden");
  require_on_cpu(d_logits, "d_logits");
  require(d_logits.dim() == 2, "d_logits must have two dimensions, got ", d_logits.sizes());
  const int64_t n = d_logits.size(0);
  require_matrix(hidden, n, hidden.size(1), "[n, D]", "hidden");
  require_matrix(d_logits, n, d_logits.size(1), "[n, V]", "d_logits");
  require_float(d_logits, "d_logits");
  require_result(total, d_logits.size(1), hidden.size(1), "[V, D]", "total");
  run(slice(d_logits, 1, 0), slice(hidden, 1, 0), nullptr, add, total);
}

}  // namespace

void cpu::bind_matmul(pybind11::module_& m) {
  m.def("logits_matmul", &logits_matmul, py::arg("hidden"), py::arg("weight"), py::arg("bias"), py::arg("out"));
  m.def("d_hidden_matmul", &d_hidden_matmul, py::arg("d_logits"), py::arg("weight"), py::arg("out"));
  m.def("d_weight_matmul", &d_weight_matmul, py::arg("d_logits"), py::arg("hidden"), py::arg("total"), py::arg("add"));
  m.def("matmuls_unavailable", &unirl::matmuls_unavailable, py::arg("dtype"));
  m.def("matmul_arithmetic", &matmul_arithmetic, py::arg("dtype"));
  m.def("matmul_variant", &matmul_variant, py::arg("dtype"));
  m.def("matmul_variants", &cpu::matmul_variants);
  m.def("force_matmuls", &cpu::force_matmuls, py::arg("variant"));
  m.def("core_kind", &cpu::core_kind);
}

}  // namespace unirl
