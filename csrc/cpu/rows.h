// The operations of the CPU backend, on plain memory. The conventions are those of unirl_kernels/backends.
#pragma once

#include <stdint.h>

#include "../program.h"
#include "segment.h"

namespace unirl::cpu {

// A value per row: fp64 if the logits are fp64, else fp32. A column without memory reads as zero and is not written.
struct Column {
  void* data = nullptr;
  bool fp64 = false;

  double get(int64_t row) const {
    if (data == nullptr) return 0;
    return fp64 ? static_cast<const double*>(data)[row] : static_cast<const float*>(data)[row];
  }
  void set(int64_t row, double value) const {
    if (data == nullptr) return;
    if (fp64) {
      static_cast<double*>(data)[row] = value;
    } else {
      static_cast<float*>(data)[row] = static_cast<float>(value);
    }
  }
};

// [batch, length, vocab]; strides in elements, that of the last dimension is 1.
struct Matrix {
  void* data;
  int64_t batch_stride, token_stride;
};

struct Rows {
  Format format;
  int64_t batch, length, vocab;
  Matrix logits;
  const int64_t* target;  // [batch, length]
  int64_t ignore;         // target of ignored rows
  double scale, softcap;  // softcap 0: none
  double temperature;
  Column row_temperature;  // replaces temperature if it has memory
};

struct StatisticsColumns {
  Column logp, entropy, lse;
};

struct MomentColumns {
  Column top, s_minus_1, sz, u_target;
};

struct MeasuredColumns {
  StatisticsColumns statistics;
  MomentColumns moments;
};

struct ObservationColumns {
  Column log_sum_sq_probs, mean_logit, largest;
  int64_t* argmax;
};

// A program, and its inputs other than the statistics.
struct ProgramInputs {
  const Program& program;
  Column fields;  // [n_fields, batch * length]
  const double* params;
};

struct FusedColumns {
  Column loss;
  StatisticsColumns statistics;
};

void token_stats(const Rows& rows, const MeasuredColumns& out);

void token_observations(const Rows& rows, const MeasuredColumns& out, const ObservationColumns& observations);

// d: gradients of the loss with respect to the statistics.
void token_stats_backward(
    const Rows& rows, const MomentColumns& moments, const StatisticsColumns& d, const Matrix& d_logits);

void fused_loss(const Rows& rows, const ProgramInputs& inputs, const Matrix& d_logits, const FusedColumns& out);

}  // namespace unirl::cpu
