// The bindings of the CUDA backend as a Python module of their own, and what directs the emulator. The only file here
// that knows what the backend's functions are called.
#include "csrc/cuda/bindings.cpp"

#include "machine/machine.h"

namespace py = pybind11;

namespace {

void schedule(const std::string& order, uint64_t seed) {
  const std::map<std::string, emulator::Order> orders = {
      {"forward", emulator::Order::FORWARD},
      {"backward", emulator::Order::BACKWARD},
      {"random", emulator::Order::RANDOM},
  };
  emulator::machine.schedule(orders.at(order), seed);
}

unsigned cluster() { return emulator::machine.launch().cluster; }

void run_at_once(unsigned blocks) { emulator::blocks_at_once = blocks; }

bool error_is_left() { return cudaGetLastError() != cudaSuccess; }

void plant(int fault) { emulator::planted_fault = fault; }

}  // namespace

PYBIND11_MODULE(UNIRL_EMULATOR, m) {
  unirl::find_torch();
  unirl::cuda::bind(m);
  m.def("schedule", &schedule, py::arg("order"), py::arg("seed") = 0,
        "Let threads go on in the order forward, backward or random.");
  m.def("cluster", &cluster, "Blocks of a cluster in the last launch.");
  m.def("run_at_once", &run_at_once, py::arg("blocks"), "Say that a part of the device runs so many blocks at once.");
  m.def("error_is_left", &error_is_left, "Whether a call left an error behind; forgets it.");
  m.def("plant", &plant, py::arg("fault"), "Let the kernels have this fault of those compiled into them; -1: none.");
}
