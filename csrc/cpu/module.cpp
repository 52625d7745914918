// unirl_kernels._C. Its functions do the checks for memory safety, unwrap tensors and call the kernels.
#include <stdlib.h>

#include <new>

#include "../arguments.h"
#include "bindings.h"
#include "dispatch.h"
#include "memory.h"

namespace {

namespace cpu = unirl::cpu;
namespace py = pybind11;
using unirl::Dtype;
using unirl::new_tensor;

// An uninitialised contiguous tensor. From 2 MiB on it uses huge pages that are kept for reuse.
py::object empty(const std::vector<int64_t>& shape, Dtype dtype) {
  constexpr size_t HUGE_PAGE = size_t(2) << 20, ALIGNMENT = 64, MOST = size_t(1) << 62;
  unirl::require(dtype.bits != 0, "dtype must be one of numbers, got ", dtype);
  size_t bytes = dtype.bits / 8;
  for (const int64_t size : shape) {
    unirl::require(size >= 0 && !__builtin_mul_overflow(bytes, size, &bytes) && bytes <= MOST,
                   "shape must be that of a tensor in memory");
  }
  if (bytes < HUGE_PAGE) {
    void* const memory = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
    if (memory == nullptr) throw std::bad_alloc();
    return new_tensor(shape, dtype, memory, bytes, [](void* of, size_t) { free(of); });
  }
  const cpu::Block block = cpu::allocate(bytes);
  return new_tensor(shape, dtype, block.memory, block.bytes, [](void* of, size_t size) { cpu::release({of, size}); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of unirl_kernels; use them through unirl_kernels.backends.cpu.";
  unirl::find_torch();
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
}
