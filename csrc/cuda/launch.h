// The launch of the kernel, with one cluster of blocks per row.
#pragma once

#include "cluster_rows.h"

namespace unirl::cuda {

// Sets the memory limit of a kernel. The limit is the same for every V, so that threads that launch it for different V
// do not lower each other's limit.
template <class Kernel>
cudaError_t allow(Kernel kernel, int bytes, int cluster) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && cluster > PORTABLE_CLUSTER) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

// Why rows are too long or too many for the kernel; empty if they are not.
inline std::string refusal(int64_t vocab, int64_t n_rows, int64_t logit_bytes) {
  const int cluster = geometry(vocab, logit_bytes).cluster;
  if (cluster == 0) {
    return "kernel 'cluster' keeps a row in the shared memory of " + std::to_string(MAX_CLUSTER) +
           " blocks: logits of this dtype must have V <= " + std::to_string(max_vocab(logit_bytes)) + ", got " +
           std::to_string(vocab) + "; Plan(backend='triton') takes any V";
  }
  if (n_rows * cluster > INT32_MAX) {
    return "kernel 'cluster' takes at most " + std::to_string(INT32_MAX / cluster) + " rows of this V, got " +
           std::to_string(n_rows);
  }
  return "";
}

// Launches the kernel. Returns an error message, empty on success.
template <class Format, class Gradient, bool CAPPED, class Step>
std::string launch(const Rows& rows, const Matrix& d_logits, const Step& step, cudaStream_t stream) {
  const int64_t n_rows = rows.batch * rows.length, bytes = sizeof(typename Format::Storage);
  const std::string reason = refusal(rows.vocab, n_rows, bytes);
  if (!reason.empty() || n_rows == 0) return reason;
  const Geometry cut = geometry(rows.vocab, bytes);
  const auto kernel = cluster_rows<Format, Gradient, CAPPED, Step>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(n_rows * cut.cluster));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = cut.width * bytes + Slice<Format>::SLACK;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cut.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaError_t error = allow(kernel, MAX_SLICE + Slice<Format>::SLACK, cut.cluster);
  if (error == cudaSuccess && cut.cluster > PORTABLE_CLUSTER) {
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error == cudaSuccess && clusters == 0) {
      return "kernel 'cluster' needs " + std::to_string(cut.cluster) + " blocks at once for rows of " +
             std::to_string(rows.vocab) + " logits, and no part of this device runs so many; " +
             "Plan(backend='triton') takes any V";
    }
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, rows, d_logits, cut.width, step);
  return error == cudaSuccess ? "" : failure("cluster", error);
}

// The same, for the formats of rows and d_logits.
template <class Step>
std::string launch(const Rows& rows, const Matrix& d_logits, const Step& step, cudaStream_t stream) {
  const bool capped = rows.softcap > 0;
  const auto run = [&](auto format, auto gradient) {
    typedef decltype(format) F;
    typedef decltype(gradient) G;
    return capped ? launch<F, G, true>(rows, d_logits, step, stream)
                  : launch<F, G, false>(rows, d_logits, step, stream);
  };
  if constexpr (Step::WRITES) {
    if (rows.logits.format == Format::FP32 && d_logits.format == Format::BF16) return run(Float32(), BFloat16());
  }
  switch (rows.logits.format) {
    case Format::FP32: return run(Float32(), Float32());
    case Format::BF16: return run(BFloat16(), BFloat16());
    case Format::FP16: return run(Float16(), Float16());
  }
  return "unknown format of logits";
}

}  // namespace unirl::cuda
