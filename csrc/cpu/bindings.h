// The CPU functions of unirl_kernels._C.
#pragma once

#include "../tensor.h"
#include "segment.h"

namespace unirl::cpu {

// Throws std::invalid_argument if logits cannot have this dtype.
Format format_of(Dtype dtype);

void bind_rows(pybind11::module_& m);
void bind_matmul(pybind11::module_& m);

}  // namespace unirl::cpu
