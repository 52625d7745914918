// Matmuls with fp32 results: the linear layer before the loss, and its gradients.
#pragma once

#include <string>

#include "panels.h"

namespace unirl::cpu {

// result[i, j] = sum over k of rows[i, k] columns[j, k] + bias[j], or the same added to what is there. Sums are fp32,
// in an order that the depth, the formats and the instruction set determine.
struct Matmul {
  Slice rows, columns;  // columns.format: what is multiplied; rows may be FP32 nevertheless
  const float* bias;    // a value per column, or null
  bool add;
  float* result;
  int64_t row_stride;
};

void multiply(const Matmul& matmul);

// In which format factors are multiplied whose second one is given so: BF16 or FP32.
Format multiplied_as(Format format);

// Why factors of this format are not multiplied on this machine; empty where they are.
std::string matmuls_unavailable(Format format);

}  // namespace unirl::cpu
