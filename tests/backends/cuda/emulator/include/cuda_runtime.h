// What nvcc gives a .cu file without being asked: qualifiers, built-in variables, intrinsics, launches.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <type_traits>

#include "cuda_runtime_api.h"
#include "machine/operations.h"
#include "ptx.h"
#include "vector_types.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

// Of a variable in shared memory; the translation of the sources calls them.
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_memory());
}

template <class T>
T& shared_variable(const char* file, int line) {
  return *reinterpret_cast<T*>(static_variable(file, line, sizeof(T)));
}

}  // namespace emulator

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::sync_threads({"__syncthreads", file, line});
}

inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::sync_warp({"__syncwarp", file, line});
}

template <class T>
T __shfl_xor_sync(
    unsigned mask, T value, int lanes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 32 or 64 bits");
  if (mask != 0xffffffffu) emulator::machine.fail("the emulator has shuffles of whole warps alone");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = emulator::exchange(bits, emulator::machine.running().lane ^ lanes, {"__shfl_xor_sync", file, line});
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}

template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> (bits % 32));
}

inline float __fdividef(float a, float b) { return a / b; }

template <class T>
void __stcs(T* to, T value) {
  emulator::check_alignment(to, sizeof(T), "a store");
  memcpy(to, &value, sizeof value);
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};

enum { cudaSharedmemCarveoutMaxShared = 100 };

namespace emulator {

typedef const void* Kernel;  // its address

cudaError_t set_attribute(Kernel kernel, cudaFuncAttribute attribute, int value);
cudaError_t count_clusters(int* clusters, Kernel kernel, const cudaLaunchConfig_t& config);
cudaError_t start(Kernel kernel, const cudaLaunchConfig_t& config, std::function<void()> body);

// kernel<<<grid, threads, shared, stream>>>, to be called with the kernel's arguments.
template <class... Parameters>
auto launcher(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, cudaStream_t stream) {
  return [=](const std::decay_t<Parameters>&... arguments) {
    const cudaLaunchConfig_t config = {grid, threads, shared, stream, nullptr, 0};
    start(reinterpret_cast<Kernel>(kernel), config, [=] { kernel(arguments...); });
  };
}

}  // namespace emulator

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return emulator::set_attribute(reinterpret_cast<emulator::Kernel>(kernel), attribute, value);
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(
    int* clusters, void (*kernel)(Parameters...), const cudaLaunchConfig_t* config) {
  return emulator::count_clusters(clusters, reinterpret_cast<emulator::Kernel>(kernel), *config);
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const std::decay_t<Parameters>&... arguments) {
  return emulator::start(reinterpret_cast<emulator::Kernel>(kernel), *config, [=] { kernel(arguments...); });
}
