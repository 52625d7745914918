// Tensors of torch, through the DLPack functions of torch.Tensor and a few of its methods. The library uses no symbol
// of torch, so it works with any release.
#pragma once

#include <pybind11/pybind11.h>

#include <ostream>
#include <string>
#include <vector>

#include "dlpack.h"

namespace unirl {

namespace py = pybind11;

struct Dtype {
  uint8_t code, bits;  // DLPack's
  bool operator==(const Dtype&) const = default;
};

inline constexpr Dtype FLOAT = {dlpack::FLOAT, 32}, DOUBLE = {dlpack::FLOAT, 64}, HALF = {dlpack::FLOAT, 16},
                       BFLOAT16 = {dlpack::BFLOAT, 16}, LONG = {dlpack::INT, 64};

// The name in torch's C++, such as Float and BFloat16.
std::string name_of(Dtype dtype);

struct Device {
  int32_t type, index;
  bool operator==(const Device&) const = default;
};

// Sizes or strides.
struct Extents {
  const int64_t* values;
  int32_t n;
  bool operator==(const Extents& other) const;
};

std::ostream& operator<<(std::ostream& out, Dtype dtype);
std::ostream& operator<<(std::ostream& out, Device device);
std::ostream& operator<<(std::ostream& out, Extents extents);

// An argument of a call. It is valid during the call; its memory belongs to the Python object.
class Tensor {
 public:
  // False if DLPack cannot describe the object: a sparse tensor, or one on a device without memory.
  bool is_dense() const { return dl_.dimensions >= 0; }
  // The layout and the device as Python names them, for errors.
  std::string described() const;

  int64_t dim() const { return dl_.dimensions; }
  int64_t size(int64_t i) const { return dl_.sizes[i]; }
  int64_t stride(int64_t i) const { return dl_.strides[i]; }
  Extents sizes() const { return {dl_.sizes, dl_.dimensions}; }
  Extents strides() const { return {dl_.strides, dl_.dimensions}; }
  int64_t numel() const;
  bool is_contiguous() const;
  Dtype dtype() const { return {dl_.dtype.code, dl_.dtype.bits}; }
  size_t itemsize() const { return dl_.dtype.bits / 8; }
  Device device() const { return {dl_.device.type, dl_.device.index}; }
  bool is_cpu() const { return dl_.device.type == dlpack::CPU || dl_.device.type == dlpack::CUDA_HOST; }
  bool is_cuda() const { return dl_.device.type == dlpack::CUDA; }
  void* data_ptr() const { return static_cast<char*>(dl_.data) + dl_.byte_offset; }
  template <class T>
  T* data_ptr() const {
    return static_cast<T*>(data_ptr());
  }

  // Bytes of the storage, and the bytes that sizes, strides and offset need. Asks Python for both.
  struct Storage {
    size_t bytes, needed;
  };
  Storage storage() const;

 private:
  friend bool borrow(PyObject* object, Tensor& to);
  PyObject* object_ = nullptr;
  dlpack::Tensor dl_ = {};
};

// False if the object is not a torch.Tensor.
bool borrow(PyObject* object, Tensor& to);

// False if the object is not a torch.dtype.
bool read_dtype(PyObject* object, Dtype& to);

// Looks up the functions of torch, once. Throws py::import_error if torch is too old or too new.
void find_torch();

// A contiguous torch.Tensor on the CPU. release(memory, bytes) is called when its storage is freed, in any thread.
py::object new_tensor(const std::vector<int64_t>& sizes, Dtype dtype, void* memory, size_t bytes,
                      void (*release)(void*, size_t));

// torch's current stream on a device.
void* current_stream(Device device);

// Sets this thread's number of OpenMP threads to torch's, as torch does when a thread first calls one of its functions.
void take_thread_count();

// Lets other Python threads run while this one computes.
struct WithoutGil {
  WithoutGil() : released_((take_thread_count(), true)) {}

 private:
  py::gil_scoped_release released_;
};

}  // namespace unirl

namespace pybind11::detail {

template <>
struct type_caster<unirl::Tensor> {
  PYBIND11_TYPE_CASTER(unirl::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) { return unirl::borrow(source.ptr(), value); }
};

template <>
struct type_caster<unirl::Dtype> {
  PYBIND11_TYPE_CASTER(unirl::Dtype, const_name("torch.dtype"));
  bool load(handle source, bool) { return unirl::read_dtype(source.ptr(), value); }
};

}  // namespace pybind11::detail
