#include "tensor.h"

#include <memory>

namespace unirl {
namespace {

// The names of a dtype in torch, in Python and in C++.
struct Named {
  const char *python, *cpp;
  Dtype dtype;
};
constexpr Named DTYPES[] = {
    {"float32", "Float", FLOAT},
    {"bfloat16", "BFloat16", BFLOAT16},
    {"float16", "Half", HALF},
    {"float64", "Double", DOUBLE},
    {"int64", "Long", LONG},
    {"int32", "Int", {dlpack::INT, 32}},
    {"int16", "Short", {dlpack::INT, 16}},
    {"int8", "Char", {dlpack::INT, 8}},
    {"uint8", "Byte", {dlpack::UINT, 8}},
    {"bool", "Bool", {dlpack::BOOL, 8}},
    {"complex64", "ComplexFloat", {dlpack::COMPLEX, 64}},
    {"complex128", "ComplexDouble", {dlpack::COMPLEX, 128}},
};
constexpr size_t N_DTYPES = std::size(DTYPES);

// Objects of torch that are kept as long as the process.
struct Torch {
  const dlpack::ExchangeApi* exchange;
  PyTypeObject *tensor, *dtype;
  PyObject *untyped_storage, *nbytes, *storage_offset, *get_num_threads;
  PyObject* dtypes[N_DTYPES];
};
Torch torch_ = {};

PyObject* kept(const py::handle& owner, const char* name) { return py::object(owner.attr(name)).release().ptr(); }

const dlpack::ExchangeApi* exchange_of(const py::object& tensor) {
  constexpr const char* NAME = "__dlpack_c_exchange_api__";
  if (!py::hasattr(tensor, NAME)) {
    throw py::import_error("torch.Tensor must have DLPack's exchange functions (torch 2.11 and newer have them)");
  }
  const py::object capsule = tensor.attr(NAME);
  auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  const dlpack::ExchangeApi* found = api;
  while (found != nullptr && found->version.major > dlpack::MAJOR) found = found->previous;
  if (found == nullptr || found->version.major != dlpack::MAJOR || found->borrow == nullptr) {
    throw py::import_error("torch.Tensor must have the exchange functions of DLPack 1, got version " +
                           std::to_string(api->version.major) + "." + std::to_string(api->version.minor));
  }
  return found;
}

// Calls a method of torch that returns an integer.
size_t ask(PyObject* method, PyObject* object) {
  const py::object number = py::reinterpret_steal<py::object>(PyObject_Vectorcall(method, &object, 1, nullptr));
  if (!number) throw py::error_already_set();
  const size_t value = PyLong_AsSize_t(number.ptr());
  if (value == static_cast<size_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

}  // namespace

void find_torch() {
  const py::module_ module = py::module_::import("torch");
  const py::object tensor = module.attr("Tensor");
  torch_.exchange = exchange_of(tensor);
  torch_.tensor = reinterpret_cast<PyTypeObject*>(kept(module, "Tensor"));
  torch_.dtype = reinterpret_cast<PyTypeObject*>(kept(module, "dtype"));
  torch_.untyped_storage = kept(tensor, "untyped_storage");
  torch_.storage_offset = kept(tensor, "storage_offset");
  torch_.nbytes = kept(module.attr("UntypedStorage"), "nbytes");
  torch_.get_num_threads = kept(module, "get_num_threads");
  for (size_t i = 0; i < N_DTYPES; ++i) torch_.dtypes[i] = kept(module, DTYPES[i].python);
}

bool borrow(PyObject* object, Tensor& to) {
  if (!PyType_IsSubtype(Py_TYPE(object), torch_.tensor)) return false;
  to.object_ = object;
  if (torch_.exchange->borrow(object, &to.dl_) != 0) {
    PyErr_Clear();
    to.dl_ = {};
    to.dl_.dimensions = -1;
  }
  return true;
}

bool read_dtype(PyObject* object, Dtype& to) {
  if (Py_TYPE(object) != torch_.dtype) return false;
  for (size_t i = 0; i < N_DTYPES; ++i) {
    if (object == torch_.dtypes[i]) {
      to = DTYPES[i].dtype;
      return true;
    }
  }
  to = {UINT8_MAX, 0};
  return true;
}

std::string name_of(Dtype dtype) {
  for (const Named& named : DTYPES) {
    if (named.dtype == dtype) return named.cpp;
  }
  return "another dtype";
}

std::ostream& operator<<(std::ostream& out, Dtype dtype) { return out << name_of(dtype); }

std::ostream& operator<<(std::ostream& out, Device device) {
  if (device.type == dlpack::CPU || device.type == dlpack::CUDA_HOST) return out << "cpu";
  if (device.type == dlpack::CUDA) return out << "cuda:" << device.index;
  return out << "device " << device.type << ":" << device.index << " of DLPack";
}

std::ostream& operator<<(std::ostream& out, Extents extents) {
  out << "[";
  for (int32_t i = 0; i < extents.n; ++i) out << (i ? ", " : "") << extents.values[i];
  return out << "]";
}

bool Extents::operator==(const Extents& other) const {
  if (n != other.n) return false;
  for (int32_t i = 0; i < n; ++i) {
    if (values[i] != other.values[i]) return false;
  }
  return true;
}

int64_t Tensor::numel() const {
  int64_t n = 1;
  for (int32_t i = 0; i < dl_.dimensions; ++i) n *= dl_.sizes[i];
  return n;
}

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  bool contiguous = true;
  for (int32_t i = dl_.dimensions - 1; i >= 0; --i) {
    contiguous &= dl_.sizes[i] == 1 || dl_.strides[i] == expected;
    expected *= dl_.sizes[i];
  }
  return contiguous || expected == 0;
}

std::string Tensor::described() const {
  std::string layout = py::str(py::handle(object_).attr("layout")).cast<std::string>().substr(sizeof("torch.") - 1);
  layout[0] = static_cast<char>(toupper(layout[0]));
  return layout + " on " + py::str(py::handle(object_).attr("device")).cast<std::string>();
}

Tensor::Storage Tensor::storage() const {
  const auto storage = py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch_.untyped_storage, &object_, 1, nullptr));
  if (!storage) throw py::error_already_set();
  size_t last = ask(torch_.storage_offset, object_);
  for (int32_t i = 0; i < dl_.dimensions; ++i) last += dl_.strides[i] * (dl_.sizes[i] - 1);
  return {ask(torch_.nbytes, storage.ptr()), numel() == 0 ? 0 : (last + 1) * itemsize()};
}

namespace {

struct Owned {
  dlpack::ManagedTensor managed;
  std::vector<int64_t> sizes, strides;
  void (*release)(void*, size_t);
  size_t bytes;
};

}  // namespace

py::object new_tensor(const std::vector<int64_t>& sizes, Dtype dtype, void* memory, size_t bytes,
                      void (*release)(void*, size_t)) {
  auto owned = std::make_unique<Owned>(Owned{{}, sizes, std::vector<int64_t>(sizes.size()), release, bytes});
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) owned->strides[i] = stride;
  owned->managed = {{dlpack::MAJOR, dlpack::MINOR},
                    owned.get(),
                    [](dlpack::ManagedTensor* managed) {
                      const std::unique_ptr<Owned> gone(static_cast<Owned*>(managed->context));
                      gone->release(gone->managed.tensor.data, gone->bytes);
                    },
                    0,
                    {memory,
                     {dlpack::CPU, 0},
                     static_cast<int32_t>(sizes.size()),
                     {dtype.code, dtype.bits, 1},
                     owned->sizes.data(),
                     owned->strides.data(),
                     0}};
  void* object = nullptr;
  // torch owns it from here on, even if the call fails.
  if (torch_.exchange->from_managed(&owned.release()->managed, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

void* current_stream(Device device) {
  void* stream = nullptr;
  if (torch_.exchange->current_stream(device.type, device.index, &stream) != 0) throw py::error_already_set();
  return stream;
}

void take_thread_count() {
  thread_local bool taken = false;
  if (taken) return;
  if (!py::reinterpret_steal<py::object>(PyObject_CallNoArgs(torch_.get_num_threads))) throw py::error_already_set();
  taken = true;
}

}  // namespace unirl
