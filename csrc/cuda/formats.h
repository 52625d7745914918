// Logits in memory and in registers: 16 bytes are a vector.
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

// What the two formats of 16 bits have in common. Pair: of two logits in 32 bits with two floats.
template <class Self, class Type>
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
    return {Self::pack_pair(x[0], x[1]), Self::pack_pair(x[2], x[3]), Self::pack_pair(x[4], x[5]),
            Self::pack_pair(x[6], x[7])};
  }
};

struct BFloat16 : Half<BFloat16, __nv_bfloat16> {
  static __device__ __forceinline__ float widen(Storage x) { return __bfloat162float(x); }
  static __device__ __forceinline__ Storage narrow(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
  static __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
  }
};

struct Float16 : Half<Float16, __half> {
  static __device__ __forceinline__ float widen(Storage x) { return __half2float(x); }
  static __device__ __forceinline__ Storage narrow(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
    const float low = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    return {low, __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)))};
  }
  static __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
  }
};

// The largest logits so far, or with SMALLEST the smallest: of a format of 16 bits two at a time, as they lie in memory.
// NaN where one of them is.
template <class Format, bool SMALLEST>
struct Extreme;

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

// two(a, b) is what an instruction makes of pairs.
template <class Format, class Self>
struct ExtremeOfPairs {
  typedef uint32_t Type;
  static __device__ __forceinline__ Type of(Type found, const uint4& vector) {
    return Self::two(found, Self::two(Self::two(vector.x, vector.y), Self::two(vector.z, vector.w)));
  }
  static __device__ __forceinline__ float reduced(Type found) {
    return Format::unpack_pair(Self::two(found, found >> 16)).x;
  }
};

template <bool SMALLEST>
struct Extreme<BFloat16, SMALLEST> : ExtremeOfPairs<BFloat16, Extreme<BFloat16, SMALLEST>> {
  static __device__ __forceinline__ uint32_t none() { return SMALLEST ? 0x7f807f80u : 0xff80ff80u; }
  static __device__ __forceinline__ uint32_t two(uint32_t a, uint32_t b) {
    uint32_t result;
    if (SMALLEST) {
      asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
      asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
    return result;
  }
};

template <bool SMALLEST>
struct Extreme<Float16, SMALLEST> : ExtremeOfPairs<Float16, Extreme<Float16, SMALLEST>> {
  static __device__ __forceinline__ uint32_t none() { return SMALLEST ? 0x7c007c00u : 0xfc00fc00u; }
  static __device__ __forceinline__ uint32_t two(uint32_t a, uint32_t b) {
    uint32_t result;
    if (SMALLEST) {
      asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
      asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
    return result;
  }
};

}  // namespace unirl::cuda
