#include <map>
#include <string>
#include <utility>

#include "cuda_runtime.h"

namespace emulator {
namespace {

struct Attributes {
  size_t shared = DEFAULT_SHARED;  // most bytes of dynamic memory
  bool large_clusters = false;
};

constexpr unsigned PORTABLE_CLUSTER = 8;

std::map<Kernel, Attributes> attributes;
std::string reason_of_last;           // why the last call that failed did
cudaError_t last_error = cudaSuccess;  // since it was asked for

cudaError_t fail(cudaError_t error, const std::string& reason) {
  reason_of_last = reason;
  return last_error = error;
}

}  // namespace

unsigned blocks_at_once = MAX_CLUSTER;

cudaError_t set_attribute(Kernel kernel, cudaFuncAttribute attribute, int value) {
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || static_cast<size_t>(value) > MAX_SHARED) {
        return fail(cudaErrorInvalidValue, "no block has " + std::to_string(value) + " bytes of shared memory");
      }
      attributes[kernel].shared = static_cast<size_t>(value);
      break;
    case cudaFuncAttributeNonPortableClusterSizeAllowed: attributes[kernel].large_clusters = value != 0; break;
    case cudaFuncAttributePreferredSharedMemoryCarveout: break;
  }
  return cudaSuccess;
}

// Of clusters that the attributes allow, as many as blocks that a part of the device runs make.
cudaError_t count_clusters(int* clusters, Kernel kernel, const cudaLaunchConfig_t& config) {
  const unsigned blocks = config.attrs[0].val.clusterDim.x;
  if (blocks > PORTABLE_CLUSTER && !attributes[kernel].large_clusters) {
    return fail(cudaErrorInvalidValue, "the kernel's attribute allows no cluster of " + std::to_string(blocks));
  }
  *clusters = static_cast<int>(blocks_at_once / blocks);
  return cudaSuccess;
}

cudaError_t start(Kernel kernel, const cudaLaunchConfig_t& config, std::function<void()> body) {
  const Attributes& of = attributes[kernel];
  const unsigned cluster = config.numAttrs == 0 ? 1 : config.attrs[0].val.clusterDim.x;
  if (config.gridDim.y * config.gridDim.z * config.blockDim.y * config.blockDim.z != 1) {
    return fail(cudaErrorInvalidValue, "the emulator has grids and blocks of one dimension alone");
  }
  if (config.dynamicSmemBytes > of.shared) {
    return fail(cudaErrorInvalidValue, "the kernel's attribute allows " + std::to_string(of.shared) +
                                           " bytes of dynamic shared memory, not " +
                                           std::to_string(config.dynamicSmemBytes));
  }
  if (cluster > PORTABLE_CLUSTER && !of.large_clusters) {
    return fail(cudaErrorInvalidValue, "the kernel's attribute allows no cluster of " + std::to_string(cluster));
  }
  const std::string reason =
      machine.run({config.gridDim.x, config.blockDim.x, cluster, config.dynamicSmemBytes, std::move(body)});
  return reason.empty() ? cudaSuccess : fail(cudaErrorLaunchFailure, reason);
}

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulator::reason_of_last.c_str();
}

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
