// The part of DLPack 1.x (dmlc.github.io/dlpack) through which a Python library exchanges tensors by C functions. The
// standard fixes the layouts; a larger major version has another layout.
#pragma once

#include <stdint.h>

namespace unirl::dlpack {

constexpr uint32_t MAJOR = 1, MINOR = 3;
constexpr int32_t CPU = 1, CUDA = 2, CUDA_HOST = 3;
constexpr uint8_t INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4, COMPLEX = 5, BOOL = 6;

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  DataType dtype;
  int64_t *sizes, *strides;  // in elements
  uint64_t byte_offset;      // from data to the first element
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

// What torch.Tensor.__dlpack_c_exchange_api__ points to. A function returns 0, or -1 with a Python exception set.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;  // of a smaller major version, or null
  void* allocate;
  void* to_managed;
  int (*from_managed)(ManagedTensor*, void** object);  // takes ownership of the tensor
  int (*borrow)(void* object, Tensor* out);            // out is valid as long as the object lives
  int (*current_stream)(int32_t device_type, int32_t index, void** stream);
};

}  // namespace unirl::dlpack
