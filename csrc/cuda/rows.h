// The operations of the CUDA backend, on plain device memory. The conventions are those of unirl_kernels/backends.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <string>

#include "../program.h"

namespace unirl::cuda {

enum class Format : int { FP32, BF16, FP16 };

inline int64_t bytes_of(Format format) { return format == Format::FP32 ? 4 : 2; }

// [batch, length, vocab]; strides in elements, that of the last dimension is 1.
struct Matrix {
  void* data;
  int64_t batch_stride, token_stride;
  Format format;
};

// Columns have a value per row. The comments say what a null pointer stands for.
struct Rows {
  int64_t batch, length, vocab;
  Matrix logits;
  const int64_t* target;
  int64_t ignore;  // target of ignored rows
  double scale, softcap;  // softcap 0: none
  double temperature;
  const float* row_temperature;  // null: temperature
};

struct StatisticsColumns {
  float *logp, *entropy, *lse;
};

struct MomentColumns {
  float *top, *s_minus_1, *sz, *u_target;
};

struct MeasuredColumns {
  StatisticsColumns statistics;
  MomentColumns moments;
};

struct GradientColumns {
  const float *logp, *entropy, *lse;  // null: zero
};

// A program, and its inputs other than the statistics, in device memory.
struct ProgramInputs {
  const Program& program;
  const float* fields;  // [n_fields, batch * length]
  const double* params;
};

struct FusedColumns {
  float* loss;
  StatisticsColumns statistics;
};

// Why a launch failed. Clears CUDA's last error, which torch may ask for next.
inline std::string failure(const char* kernel, cudaError_t error) {
  const std::string reason = cudaGetErrorString(error);
  cudaGetLastError();
  return "kernel '" + std::string(kernel) + "' does not start: " + reason;
}

// Each function enqueues its work on the stream, and returns an error message, empty on success. Gradients have the
// format of the logits, or BF16 if the logits are FP32.
std::string token_stats(const Rows& rows, const MeasuredColumns& out, cudaStream_t stream);

// d: gradients of the loss with respect to the statistics.
std::string token_stats_backward(
    const Rows& rows,
    const MomentColumns& moments,
    const GradientColumns& d,
    const Matrix& d_logits,
    cudaStream_t stream);

std::string fused_loss(
    const Rows& rows,
    const ProgramInputs& inputs,
    const Matrix& d_logits,
    const FusedColumns& out,
    cudaStream_t stream);

// x *= factor[0], for x as described by Matrix.
std::string scale(
    const Matrix& x,
    int64_t batch,
    int64_t length,
    int64_t vocab,
    const float* factor,
    cudaStream_t stream);

}  // namespace unirl::cuda
