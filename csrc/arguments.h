// What the bindings of the backends have in common: the arguments of unirl_kernels/backends, and checks that name them.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>

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

#ifdef UNIRL_WITH_CUDA
void bind_cuda(pybind11::module_& m);
#endif

}  // namespace unirl
