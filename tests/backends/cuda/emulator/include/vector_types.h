#pragma once

#include <stdint.h>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

// The built-in variables, of the thread that runs.
extern dim3 threadIdx, blockIdx, gridDim;
