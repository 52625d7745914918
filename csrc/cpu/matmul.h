// Matmuls with fp32 results: the linear layer before the loss, and its gradients.
#pragma once

#include <string>

#include "panels.h"

namespace unirl::cpu {

// result[i, j] = sum over k of rows[i, k] columns[j, k] + bias[j], or with add the same added to result. Sums are fp32.
// Their order depends only on the depth, the formats and the instruction set.
struct Matmul {
  Slice rows, columns;  // columns.format selects the kernel; rows may also be FP32
  const float* bias;    // a value per column, or null
  bool add;
  float* result;
  int64_t row_stride;
};

void multiply(const Matmul& matmul);

// The format in which factors are multiplied if the second one has this format: BF16 or FP32.
Format multiplied_as(Format format);

// Why this machine cannot multiply factors of this format; empty if it can.
std::string matmuls_unavailable(Format format);

}  // namespace unirl::cpu
