// What the bindings of the backends have in common: the arguments of unirl_kernels/backends, and checks that name them.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "program_code.h"

namespace unirl {

using OptionalTensor = std::optional<at::Tensor>;

// The named tuples of unirl_kernels/backends, in the order of their fields.
using ReadoutArgs = std::tuple<double, std::optional<double>, double, OptionalTensor>;
using RowStats = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using RowMomentsArgs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Measured = std::tuple<RowStats, RowMomentsArgs>;
using RowObservations = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using ObservedArgs = std::tuple<RowStats, RowMomentsArgs, RowObservations>;
using RowGradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>;
using ProgramArgs = std::tuple<std::string, at::Tensor, at::Tensor>;
using FusedRows = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// A dense tensor whose storage holds what sizes and strides say: sharded training frees the memory of parameters that
// keep their shape.
inline void require_memory(const at::Tensor& x, const char* name) {
  require(x.layout() == at::kStrided && x.has_storage(), name, " must be a dense tensor, got ", x.layout());
  if (x.numel() == 0) return;
  const size_t needed =
      at::detail::computeStorageNbytes(x.sizes(), x.strides(), x.itemsize(), x.storage_offset());
  require(x.storage().nbytes() >= needed, name, " must have memory for its shape ", x.sizes(), ", which takes ", needed,
          " bytes; its storage has ", x.storage().nbytes());
}

// [B, L, V] with rows of contiguous logits, where the logits lie.
inline void require_rows(const at::Tensor& x, const at::Tensor& logits, const char* name) {
  require(x.device() == logits.device(), name, " must be on ", logits.device(), " like logits, got ", x.device());
  require(x.dim() == 3 && x.size(2) >= 1, name, " must have shape [B, L, V] with V >= 1, got ", x.sizes());
  require(x.sizes() == logits.sizes(), name, " must have shape ", logits.sizes(), " like logits, got ", x.sizes());
  require(x.size(2) == 1 || x.stride(2) == 1, name, " must have stride 1 in its last dimension, got ", x.stride(2));
  require_memory(x, name);
}

inline void require_per_row(const at::Tensor& x, const at::Tensor& logits, at::ScalarType dtype, const char* name) {
  require(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
  require(x.device() == logits.device() && x.is_contiguous() && x.numel() == logits.size(0) * logits.size(1), name,
          " must be contiguous on ", logits.device(), " with a value per row of logits ", logits.sizes(), ", got ",
          x.sizes(), " on ", x.device());
  require_memory(x, name);
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

// The decoded program, whose fields (of the statistics' dtype) and params are there.
inline std::shared_ptr<const Program> program_of(
    const ProgramArgs& args, const at::Tensor& logits, at::ScalarType dtype) {
  const auto& [text, fields, params] = args;
  const std::shared_ptr<const Program> decoded = decode_program(text);
  const Program& program = *decoded;
  require(fields.scalar_type() == dtype && fields.device() == logits.device() && fields.is_contiguous() &&
              fields.dim() == 3 && fields.size(0) == program.n_fields && fields.size(1) == logits.size(0) &&
              fields.size(2) == logits.size(1),
          "fields must be contiguous ", dtype, " on ", logits.device(), " with shape [n_fields, B, L] = [",
          program.n_fields, ", ", logits.size(0), ", ", logits.size(1), "], got ", fields.scalar_type(), " ",
          fields.sizes(), " on ", fields.device());
  require_memory(fields, "fields");
  require(params.scalar_type() == at::kDouble && params.device() == logits.device() && params.is_contiguous() &&
              params.dim() == 1 && params.numel() == program.n_params,
          "params must be a contiguous Double vector on ", logits.device(), " with the program's ", program.n_params,
          " numbers, got ", params.scalar_type(), " ", params.sizes(), " on ", params.device());
  require_memory(params, "params");
  return decoded;
}

#ifdef UNIRL_WITH_CUDA
void bind_cuda(pybind11::module_& m);
#endif

}  // namespace unirl
