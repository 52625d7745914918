// The formats of logits: conversion between memory, in vectors of 16 bytes, and registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>

#include "geometry.h"

namespace unirl::cuda {

struct Float32 {
  typedef float Storage;
  static constexpr int N = 4;
  static __device__ __forceinline__ float widen(Storage x) { return x; }
  static __device__ __forceinline__ Storage narrow(float x) { return x; }
  static __device__ __forceinline__ void unpack(const uint4& vector, float (&x)[N]) {
    x[0] = __uint_as_float(vector.x);
    x[1] = __uint_as_float(vector.y);
    x[2] = __uint_as_float(vector.z);
    x[3] = __uint_as_float(vector.w);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[N]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  }
};

// Base of the two 16-bit formats. A pair is two logits in 32 bits.
template <class Self, class Type, bool BRAIN>
struct Half {
  typedef Type Storage;
  static constexpr int N = 8;
  static __device__ __forceinline__ void unpack(const uint4& vector, float (&x)[N]) {
    const uint32_t pairs[] = {vector.x, vector.y, vector.z, vector.w};
    for (int k = 0; k < 4; ++k) {
      const float2 pair = Self::unpack_pair(pairs[k]);
      x[2 * k] = pair.x;
      x[2 * k + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[N]) {
    return {pack_pair(x[0], x[1]), pack_pair(x[2], x[3]), pack_pair(x[4], x[5]), pack_pair(x[6], x[7])};
  }
  static __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    uint32_t pair;
    if (BRAIN) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
  }
  // Elementwise minimum and maximum of two pairs; NaN if either element is NaN.
  static __device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) {
    uint32_t pair;
    if (BRAIN) {
      asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    } else {
      asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    }
    return pair;
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t pair;
    if (BRAIN) {
      asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    } else {
      asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    }
    return pair;
  }
};

struct BFloat16 : Half<BFloat16, __nv_bfloat16, true> {
  static __device__ __forceinline__ float widen(Storage x) { return __bfloat162float(x); }
  static __device__ __forceinline__ Storage narrow(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
  static constexpr uint32_t INFINITIES = 0x7f807f80u;
};

struct Float16 : Half<Float16, __half, false> {
  static __device__ __forceinline__ float widen(Storage x) { return __half2float(x); }
  static __device__ __forceinline__ Storage narrow(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
    const float low = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    return {low, __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)))};
  }
  static constexpr uint32_t INFINITIES = 0x7c007c00u;
};

// Running maximum of logits, or minimum with SMALLEST. 16-bit formats take two at a time, without conversion. NaN if a
// logit is NaN.
template <class Format, bool SMALLEST>
struct Extreme {
  typedef uint32_t Type;
  static __device__ __forceinline__ Type none() {
    return SMALLEST ? Format::INFINITIES : Format::INFINITIES | 0x80008000u;
  }
  static __device__ __forceinline__ Type two(Type a, Type b) {
    return SMALLEST ? Format::smaller(a, b) : Format::larger(a, b);
  }
  static __device__ __forceinline__ Type of(Type found, const uint4& vector) {
    return two(found, two(two(vector.x, vector.y), two(vector.z, vector.w)));
  }
  static __device__ __forceinline__ float reduced(Type found) {
    return Format::unpack_pair(two(found, found >> 16)).x;
  }
};

template <bool SMALLEST>
struct Extreme<Float32, SMALLEST> {
  typedef float Type;
  static __device__ __forceinline__ Type none() { return SMALLEST ? INFINITY : -INFINITY; }
  static __device__ __forceinline__ Type two(Type a, Type b) {
    Type result;
    if (SMALLEST) {
      asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    } else {
      asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    }
    return result;
  }
  static __device__ __forceinline__ Type of(Type found, const uint4& vector) {
    const Type low = two(__uint_as_float(vector.x), __uint_as_float(vector.y));
    return two(found, two(low, two(__uint_as_float(vector.z), __uint_as_float(vector.w))));
  }
  static __device__ __forceinline__ float reduced(Type found) { return found; }
};

}  // namespace unirl::cuda
