// Logits in memory and in registers: 16 bytes are a vector.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
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

}  // namespace unirl::cuda
