// The operations of the CPU backend, on plain memory. The conventions are those of unirl_kernels/backends.
#pragma once

#include <stdint.h>

#include "../program.h"
#include "segment.h"

namespace unirl::cpu {

// A value per row, fp32, or fp64 where the logits are. Without memory it is read as zero and not written.
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
  int64_t ignore;         // the target of rows that are not read
  double scale, softcap;  // softcap 0: none
  double temperature;
  Column row_temperature;  // replaces temperature where it has memory
};

struct StatisticsColumns {
  Column logp, entropy, lse;
};

struct ObservationColumns {
  StatisticsColumns statistics;
  Column log_sum_sq_probs, mean_logit, largest;
  int64_t* argmax;
};

// What the program reads of a row. old_logp without memory: the row's own logp.
struct FieldColumns {
  Column weight, advantage, old_logp, ref_logp;
};

struct FusedColumns {
  Column loss, logp, entropy;
};

void token_stats(const Rows& rows, const StatisticsColumns& out);

void token_observations(const Rows& rows, const ObservationColumns& out);

void token_stats_backward(
    const Rows& rows, const StatisticsColumns& at, const StatisticsColumns& d, const Matrix& d_logits);

void fused_loss(
    const Rows& rows,
    const FieldColumns& fields,
    const Program& program,
    const double* params,
    const Matrix& d_logits,
    const FusedColumns& out);

}  // namespace unirl::cpu
