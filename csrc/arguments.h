// What the bindings of the backends have in common: the arguments of unirl_kernels/backends, and checks that name them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "program_code.h"

namespace unirl {

using OptionalTensor = std::optional<at::Tensor>;

// The named tuples of unirl_kernels/backends, in the order of their fields.
using ReadoutArgs = std::tuple<double, std::optional<double>, double, OptionalTensor>;
using RowStats = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using RowObservations =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using RowGradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>;
using RowFields = std::tuple<at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;
using FusedRows = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// [B, L, V] with rows of contiguous logits, where the logits lie.
inline void require_rows(const at::Tensor& x, const at::Tensor& logits, const char* name) {
  require(x.device() == logits.device(), name, " must be on ", logits.device(), " like logits, got ", x.device());
  require(x.dim() == 3 && x.size(2) >= 1, name, " must have shape [B, L, V] with V >= 1, got ", x.sizes());
  require(x.sizes() == logits.sizes(), name, " must have shape ", logits.sizes(), " like logits, got ", x.sizes());
  require(x.size(2) == 1 || x.stride(2) == 1, name, " must have stride 1 in its last dimension, got ", x.stride(2));
}

inline void require_per_row(const at::Tensor& x, const at::Tensor& logits, at::ScalarType dtype, const char* name) {
  require(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
  require(x.device() == logits.device() && x.is_contiguous() && x.numel() == logits.size(0) * logits.size(1), name,
          " must be contiguous on ", logits.device(), " with a value per row of logits ", logits.sizes(), ", got ",
          x.sizes(), " on ", x.device());
}

// What a backend's Rows say of all rows but where their logits are. column makes its columns, of a tensor that may be
// missing, the logits and a name.
template <class Rows, class Column>
Rows rows_without_logits(
    const at::Tensor& logits,
    const at::Tensor& target,
    int64_t ignore,
    const ReadoutArgs& readout,
    const Column& column) {
  const auto& [scale, softcap, temperature, row_temperature] = readout;
  require_per_row(target, logits, at::kLong, "target");
  Rows rows;
  rows.batch = logits.size(0);
  rows.length = logits.size(1);
  rows.vocab = logits.size(2);
  rows.target = target.data_ptr<int64_t>();
  rows.ignore = ignore;
  rows.scale = scale;
  rows.softcap = softcap.value_or(0);
  rows.temperature = temperature;
  rows.row_temperature = column(row_temperature, logits, "row_temperature");
  return rows;
}

// An encoded program whose inputs are there.
inline Program program_of(
    const std::vector<int64_t>& code, const at::Tensor& params, const RowFields& fields, const at::Tensor& logits) {
  const auto& [weight, advantage, old_logp, ref_logp] = fields;
  require(params.scalar_type() == at::kDouble && params.dim() == 1 && params.is_contiguous() &&
              params.device() == logits.device(),
          "params must be a contiguous float64 vector on ", logits.device(), ", got ", params.scalar_type(), " ",
          params.sizes(), " on ", params.device());
  const Program program = decode_program(code, params.numel());
  require(ref_logp || !reads_input(program, REF_LOGP), "ref_logp must be given: the objective reads it");
  require(advantage || !reads_input(program, ADVANTAGE), "advantage must be given: the objective reads it");
  return program;
}

#ifdef UNIRL_WITH_CUDA
void bind_cuda(pybind11::module_& m);
#endif

}  // namespace unirl
