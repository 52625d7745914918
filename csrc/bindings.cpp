// unirl_kernels._C. Its functions check what memory safety needs, unwrap tensors and call the kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "arguments.h"
#include "cpu/bindings.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"

// unirl_kernels/backends/native.py reads it from the file: with another torch the extension may not load at all.
extern "C" __attribute__((visibility("default"))) const char unirl_built_with[];
__attribute__((used)) const char unirl_built_with[] = "unirl_kernels built with torch " TORCH_VERSION;

namespace {

namespace cpu = unirl::cpu;
using at::Tensor;

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
  cpu::bind_rows(m);
  cpu::bind_matmul(m);
  m.def("empty", &empty, py::arg("shape"), py::arg("dtype"));
  m.def("limit_kept_bytes", &cpu::limit_kept_bytes, py::arg("bytes"));
  m.def("kept_bytes", &cpu::kept_bytes);
  m.def("instruction_set", &cpu::instruction_set);
  m.def("compiled_instruction_sets", &cpu::compiled_instruction_sets);
  m.def("opcode_names", &unirl::opcode_names);
  m.attr("MAX_FIELDS") = unirl::MAX_FIELDS;
  m.attr("MAX_PARAMS") = unirl::MAX_PARAMS;
  m.attr("MAX_INSTRUCTIONS") = unirl::MAX_INSTRUCTIONS;
  m.attr("MAX_LIVE") = unirl::MAX_LIVE;
  m.attr("SEGMENT") = cpu::SEGMENT;
#ifdef UNIRL_WITH_CUDA
  unirl::bind_cuda(m);
#endif
}
