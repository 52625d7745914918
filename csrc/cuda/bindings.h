// The functions of unirl_kernels._cuda.
#pragma once

#include <pybind11/pybind11.h>

namespace unirl::cuda {

void bind(pybind11::module_& m);

}  // namespace unirl::cuda
