// unirl_kernels._cuda: kernels for CUDA devices of compute capability 9.0 and newer.
#include "../tensor.h"
#include "bindings.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of unirl_kernels; use them through unirl_kernels.backends.cuda.";
  unirl::find_torch();
  unirl::cuda::bind(m);
}
