// Vectors of floats, one source for every instruction set: the compiler's vector extensions with the width
// UNIRL_SIMD_BYTES, and intrinsics for operations that the extensions lack (conversion of fp16) or compile badly
// (maximum).
//
// Everything is in namespace UNIRL_ISA, which differs in each unit that includes this file. Otherwise the linker would
// keep one copy of an inline function, perhaps compiled for AVX-512, and run it on any machine.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The x86 units of 32 and 64 bytes are compiled for machines that have FMA.
#if defined(__ARM_FEATURE_FMA) || UNIRL_SIMD_BYTES >= 32
#define UNIRL_HAS_FMA
#endif

#define UNIRL_ALWAYS_INLINE __attribute__((always_inline)) inline
#define UNIRL_HALVES _Pragma("GCC unroll 4")

namespace unirl::cpu::UNIRL_ISA {

typedef float F32 __attribute__((vector_size(UNIRL_SIMD_BYTES)));
typedef double F64 __attribute__((vector_size(UNIRL_SIMD_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(UNIRL_SIMD_BYTES)));
typedef int16_t S16 __attribute__((vector_size(UNIRL_SIMD_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(UNIRL_SIMD_BYTES)));
typedef uint16_t U16Half __attribute__((vector_size(UNIRL_SIMD_BYTES / 2)));

constexpr int LANES = UNIRL_SIMD_BYTES / 4;

// Vectors that are computed in parallel. An exponential is a chain of fifteen operations; four parallel chains keep the
// schedulers of a Zen 5 core busy (bf16 gradient 7.5 Glogit/s, with two 6.3; benchmarks/NOTES.md).
constexpr int VECTORS = 4;
constexpr int STEP = VECTORS * LANES;

// STEP logits. The format decides which logit is in which lane: column(k, lane).
struct Block {
  F32 of[VECTORS];
};

UNIRL_ALWAYS_INLINE F32 splat(float x) { return x - F32{}; }

// Memory of any alignment and type. (With memcpy, GCC 12 keeps vectors of 64 bytes on the stack, which is a sixth
// slower.)
template <class Vector>
struct Unaligned {
  typedef Vector Type __attribute__((aligned(1), may_alias));
};

template <class Vector>
UNIRL_ALWAYS_INLINE Vector load(const void* from) {
  return *static_cast<const typename Unaligned<Vector>::Type*>(from);
}

template <class Vector>
UNIRL_ALWAYS_INLINE void store(void* to, Vector x) {
  *static_cast<typename Unaligned<Vector>::Type*>(to) = x;
}

// Stores past the caches, to memory that is aligned to a vector. fence() orders it before later stores.
UNIRL_ALWAYS_INLINE void stream(void* to, U32 x) {
#if defined(__x86_64__) && UNIRL_SIMD_BYTES == 64
  _mm512_stream_si512((__m512i*)to, (__m512i)x);
#elif defined(__x86_64__) && UNIRL_SIMD_BYTES == 32
  _mm256_stream_si256((__m256i*)to, (__m256i)x);
#elif defined(__x86_64__)
  _mm_stream_si128((__m128i*)to, (__m128i)x);
#else
  store(to, x);
#endif
}

UNIRL_ALWAYS_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// a > b ? a : b. If either is NaN: b.
UNIRL_ALWAYS_INLINE F32 maximum(F32 a, F32 b) {
#if defined(__x86_64__) && UNIRL_SIMD_BYTES == 64
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__x86_64__) && UNIRL_SIMD_BYTES == 32
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (F32)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

template <class Lane, int BYTES>
struct Wide {
  typedef Lane Type __attribute__((vector_size(BYTES)));
};

// Reduces the lanes with best, in halves (log2 steps). In order, a short row would wait for its lanes as long as for
// its exponentials.
template <class Lane, int BYTES, class Best>
UNIRL_ALWAYS_INLINE Lane reduced(typename Wide<Lane, BYTES>::Type x, const Best& best) {
  constexpr int N = BYTES / sizeof(Lane);
  Lane lanes[N];
  store(lanes, x);
  if constexpr (BYTES > 16) {
    typedef typename Wide<Lane, BYTES / 2>::Type Half;
    return reduced<Lane, BYTES / 2>(best(load<Half>(lanes), load<Half>(lanes + N / 2)), best);
  } else {
    UNIRL_HALVES for (int n = N / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) lanes[i] = best(lanes[i], lanes[i + n]);
    }
    return lanes[0];
  }
}

// Sum of the lanes in double: in fp32, a lane that holds 1 would absorb a tail of 1e-9 in the others. It still absorbs
// its own tail, at most one column in 16.
UNIRL_ALWAYS_INLINE double sum(const Block& block) {
  typedef float Half __attribute__((vector_size(UNIRL_SIMD_BYTES / 2)));
  F64 wide{};
  for (int k = 0; k < VECTORS; ++k) {
    float lanes[LANES];
    store(lanes, block.of[k]);
    wide += __builtin_convertvector(load<Half>(lanes), F64);
    wide += __builtin_convertvector(load<Half>(lanes + LANES / 2), F64);
  }
  double totals[LANES / 2];
  store(totals, wide);
  UNIRL_HALVES for (int n = LANES / 4; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) totals[i] += totals[i + n];
  }
  return totals[0];
}

struct Float32 {
  static constexpr int EXP_DEGREE = 5;  // enough for a gradient of this precision
  typedef float Storage;
  static constexpr Storage INFINITY_BITS[2] = {__builtin_inff(), -__builtin_inff()};
  static constexpr int column(int k, int lane) { return k * LANES + lane; }
  static UNIRL_ALWAYS_INLINE float value(Storage x) { return x; }
  static UNIRL_ALWAYS_INLINE Block load(const Storage* x) {
    Block block;
    for (int k = 0; k < VECTORS; ++k) block.of[k] = UNIRL_ISA::load<F32>(x + k * LANES);
    return block;
  }
  static UNIRL_ALWAYS_INLINE void store(Storage* x, const Block& block) {
    for (int k = 0; k < VECTORS; ++k) UNIRL_ISA::store(x + k * LANES, block.of[k]);
  }
  static UNIRL_ALWAYS_INLINE void stream(Storage* x, const Block& block) {
    for (int k = 0; k < VECTORS; ++k) UNIRL_ISA::stream(x + k * LANES, (U32)block.of[k]);
  }
};

// Logits of even index are in one vector, odd ones in the other. So widening is one shift or one mask, and narrowing
// needs no shuffle.
struct BFloat16 {
  static constexpr int EXP_DEGREE = 3;  // enough for a gradient of this precision
  typedef uint16_t Storage;
  static constexpr Storage INFINITY_BITS[2] = {0x7f80, 0xff80};
  static constexpr int column(int k, int lane) { return k / 2 * 2 * LANES + 2 * lane + k % 2; }
  static UNIRL_ALWAYS_INLINE float value(Storage x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
  static UNIRL_ALWAYS_INLINE Block load(const Storage* x) {
    Block block;
    for (int k = 0; k < VECTORS; k += 2) {
      const U32 raw = UNIRL_ISA::load<U32>(x + k * LANES);
      block.of[k] = (F32)(raw << 16);
      block.of[k + 1] = (F32)(raw & 0xffff0000u);
    }
    return block;
  }
  // Rounds to nearest by one addition; ties go away from zero. Ties to even would need two more instructions, a fifth
  // of the gradient sweep. Only one value in 65536 is a tie, and each value already has an error of 1e-7. NaN stays
  // NaN if its low bits are 0: those of NAN, of arithmetic with it, and of bf16 values. 0x7fffffff would become -0.
  static UNIRL_ALWAYS_INLINE U32 rounded(F32 x) { return (U32)x + 0x8000u; }
  static UNIRL_ALWAYS_INLINE U32 packed(const Block& block, int k) {
    return (rounded(block.of[k]) >> 16) | (rounded(block.of[k + 1]) & 0xffff0000u);
  }
  static UNIRL_ALWAYS_INLINE void store(Storage* x, const Block& block) {
    for (int k = 0; k < VECTORS; k += 2) UNIRL_ISA::store(x + k * LANES, packed(block, k));
  }
  static UNIRL_ALWAYS_INLINE void stream(Storage* x, const Block& block) {
    for (int k = 0; k < VECTORS; k += 2) UNIRL_ISA::stream(x + k * LANES, packed(block, k));
  }
};

struct Float16 {
  static constexpr int EXP_DEGREE = 4;  // enough for a gradient of this precision
  typedef uint16_t Storage;
  static constexpr Storage INFINITY_BITS[2] = {0x7c00, 0xfc00};
  static constexpr int column(int k, int lane) { return k * LANES + lane; }
  static UNIRL_ALWAYS_INLINE float value(Storage x) {
    const Storage entry[LANES] = {x};
    return widened(entry)[0];
  }
  static UNIRL_ALWAYS_INLINE Block load(const Storage* x) {
    Block block;
    for (int k = 0; k < VECTORS; ++k) block.of[k] = widened(x + k * LANES);
    return block;
  }
  static UNIRL_ALWAYS_INLINE void store(Storage* x, const Block& block) {
    for (int k = 0; k < VECTORS; ++k) narrowed(x + k * LANES, block.of[k]);
  }
  static UNIRL_ALWAYS_INLINE void stream(Storage* x, const Block& block) { store(x, block); }

#if defined(__x86_64__) && UNIRL_SIMD_BYTES == 64
  static UNIRL_ALWAYS_INLINE F32 widened(const Storage* x) {
    return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
  }
  static UNIRL_ALWAYS_INLINE void narrowed(Storage* x, F32 v) {
    _mm256_storeu_si256((__m256i*)x, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__x86_64__) && UNIRL_SIMD_BYTES == 32
  static UNIRL_ALWAYS_INLINE F32 widened(const Storage* x) {
    return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
  }
  static UNIRL_ALWAYS_INLINE void narrowed(Storage* x, F32 v) {
    _mm_storeu_si128((__m128i*)x, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  // The exponent bias differs by 112: multiplying by 2^112 corrects it and makes subnormals normal.
  static UNIRL_ALWAYS_INLINE F32 widened(const Storage* x) {
    const U32 raw = __builtin_convertvector(UNIRL_ISA::load<U16Half>(x), U32);
    const F32 magnitude = (F32)((raw & 0x7fffu) << 13) * 0x1p112f;
    const U32 special = (U32)((raw & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (F32)((U32)magnitude | special | ((raw & 0x8000u) << 16));
  }
  // An addition that aligns the last place with that of a float rounds subnormal results. Normal ones round as in
  // BFloat16.
  static UNIRL_ALWAYS_INLINE void narrowed(Storage* x, F32 v) {
    const U32 bits = (U32)v;
    const U32 magnitude = bits & 0x7fffffffu;
    const U32 tiny = (U32)((F32)magnitude + 0.5f) - 0x3f000000u;
    const U32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    U32 half = magnitude < (113u << 23) ? tiny : normal;
    half = magnitude >= 0x477ff000u ? (U32{} + 0x7c00u) : half;
    half = magnitude > 0x7f800000u ? (U32{} + 0x7e00u) : half;
    UNIRL_ISA::store(x, __builtin_convertvector(half | ((bits >> 16) & 0x8000u), U16Half));
  }
#endif
};

}  // namespace unirl::cpu::UNIRL_ISA
