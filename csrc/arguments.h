// Shared by the bindings of all backends: the argument types of unirl_kernels/backends, and checks that name them.
#pragma once

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "program_code.h"
#include "tensor.h"

namespace unirl {

using OptionalTensor = std::optional<Tensor>;

// The named tuples of unirl_kernels/backends, in the order of their fields.
using ReadoutArgs = std::tuple<double, std::optional<double>, double, OptionalTensor>;
using RowStats = std::tuple<Tensor, Tensor, Tensor>;
using RowMomentsArgs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Measured = std::tuple<RowStats, RowMomentsArgs>;
using RowObservations = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using ObservedArgs = std::tuple<RowStats, RowMomentsArgs, RowObservations>;
using RowGradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>;
using ProgramArgs = std::tuple<std::string, Tensor, Tensor>;
using FusedRows = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline void require_dense(const Tensor& x, const char* name) {
  if (!x.is_dense()) require(false, name, " must be a dense tensor, got ", x.described());
}

// Checks that the storage is as large as sizes and strides need. It asks torch, which takes as long as all other checks
// of a call together: so it is only for tensors that callers make.
inline void require_storage(const Tensor& x, const char* name) {
  const Tensor::Storage storage = x.storage();
  require(storage.bytes >= storage.needed, name, " must have memory for its shape ", x.sizes(), ", which takes ",
          storage.needed, " bytes; its storage has ", storage.bytes);
}

inline void require_storages(const RowGradients& gradients) {
  const auto& [d_logp, d_entropy, d_lse] = gradients;
  if (d_logp) require_storage(*d_logp, "d_logp");
  if (d_entropy) require_storage(*d_entropy, "d_entropy");
  if (d_lse) require_storage(*d_lse, "d_lse");
}

// Sharded training frees the storage of parameters that keep their shape. A freed storage is at address 0, so the
// address of a tensor in it is its offset: only small addresses need the check.
inline void require_memory(const Tensor& x, const char* name) {
  constexpr uintptr_t BEYOND_OFFSETS = uintptr_t(1) << 46;
  if (reinterpret_cast<uintptr_t>(x.data_ptr()) < BEYOND_OFFSETS) require_storage(x, name);
}

// Checks for [B, L, V] with contiguous rows, on the device of the logits.
inline void require_rows(const Tensor& x, const Tensor& logits, const char* name) {
  require_dense(x, name);
  require(x.device() == logits.device(), name, " must be on ", logits.device(), " like logits, got ", x.device());
  require(x.dim() == 3 && x.size(2) >= 1, name, " must have shape [B, L, V] with V >= 1, got ", x.sizes());
  require(x.sizes() == logits.sizes(), name, " must have shape ", logits.sizes(), " like logits, got ", x.sizes());
  require(x.size(2) == 1 || x.stride(2) == 1, name, " must have stride 1 in its last dimension, got ", x.stride(2));
  require_memory(x, name);
}

inline void require_per_row(const Tensor& x, const Tensor& logits, Dtype dtype, const char* name) {
  require_dense(x, name);
  require(x.dtype() == dtype, name, " must be ", dtype, ", got ", x.dtype());
  require(x.device() == logits.device() && x.is_contiguous() && x.numel() == logits.size(0) * logits.size(1), name,
          " must be contiguous on ", logits.device(), " with a value per row of logits ", logits.sizes(), ", got ",
          x.sizes(), " on ", x.device());
  require_memory(x, name);
}

// A backend's Rows without the pointer to the logits. column(tensor or none, logits, name) makes the backend's columns.
template <class Rows, class Column>
Rows rows_without_logits(
    const Tensor& logits,
    const Tensor& target,
    int64_t ignore,
    const ReadoutArgs& readout,
    const Column& column) {
  const auto& [scale, softcap, temperature, row_temperature] = readout;
  require_storage(logits, "logits");
  require_per_row(target, logits, LONG, "target");
  require_storage(target, "target");
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
  if (row_temperature) require_storage(*row_temperature, "row_temperature");
  return rows;
}

// Decodes the program, and checks its fields (of the statistics' dtype) and params.
inline std::shared_ptr<const Program> program_of(
    const ProgramArgs& args, const Tensor& logits, Dtype dtype) {
  const auto& [text, fields, params] = args;
  const std::shared_ptr<const Program> decoded = decode_program(text);
  const Program& program = *decoded;
  require_dense(fields, "fields");
  require(fields.dtype() == dtype && fields.device() == logits.device() && fields.is_contiguous() &&
              fields.dim() == 3 && fields.size(0) == program.n_fields && fields.size(1) == logits.size(0) &&
              fields.size(2) == logits.size(1),
          "fields must be contiguous ", dtype, " on ", logits.device(), " with shape [n_fields, B, L] = [",
          program.n_fields, ", ", logits.size(0), ", ", logits.size(1), "], got ", fields.dtype(), " ",
          fields.sizes(), " on ", fields.device());
  require_memory(fields, "fields");
  require_dense(params, "params");
  require(params.dtype() == DOUBLE && params.device() == logits.device() && params.is_contiguous() &&
              params.dim() == 1 && params.numel() == program.n_params,
          "params must be a contiguous Double vector on ", logits.device(), " with the program's ", program.n_params,
          " numbers, got ", params.dtype(), " ", params.sizes(), " on ", params.device());
  require_memory(params, "params");
  return decoded;
}

}  // namespace unirl
