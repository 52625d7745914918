#pragma once

#include <stdint.h>
#include <string.h>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half x) {
  _Float16 value;
  memcpy(&value, &x, sizeof value);
  return static_cast<float>(value);
}

inline __half __float2half_rn(float x) {
  const auto value = static_cast<_Float16>(x);
  __half result;
  memcpy(&result, &value, sizeof result);
  return result;
}
