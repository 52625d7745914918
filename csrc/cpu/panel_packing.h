// Packing for matmuls, one source for every instruction set: from a slice in memory to panels of units. A source file
// that includes this defines the macros of simd.h, and UNIRL_BF16_DOT if it multiplies bf16.
#pragma once

#include "../simd.h"
#include "panels.h"

#define UNIRL_UNROLL _Pragma("GCC unroll 16")

namespace unirl::cpu::UNIRL_ISA {

// The register tile: 8 by 48 sums with AVX-512, 4 by 24 with AVX2. It leaves registers for three vectors of the right
// factor and one element of the left. 11 (7) loads serve 24 (12) multiplications.
constexpr int TILE_ROWS = LANES / 2;
constexpr int TILE_VECTORS = 3;
constexpr int TILE_COLUMNS = TILE_VECTORS * LANES;

// A unit is 32 bits of a lane: one float, or two bf16 that are neighbours in depth. A class From... makes units of a
// format:
//   along(x)                      LANES units of one lane; its elements are contiguous in memory
//   across(x, depth_stride)       one unit of each of LANES lanes; the lanes are contiguous in memory
//   one(x, depth_stride, depth)   one unit of one lane, from the first depth elements; the others are zero
#if defined(UNIRL_BF16_DOT)
constexpr int UNIT_DEPTH = 2;

UNIRL_ALWAYS_INLINE U32 rounded(F32 x) {
  return (U32)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
}

struct FromFloat32 {
  typedef float Storage;
  static UNIRL_ALWAYS_INLINE U32 along(const float* x) {
    return (U32)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + LANES), _mm512_loadu_ps(x));
  }
  static UNIRL_ALWAYS_INLINE U32 across(const float* x, int64_t depth_stride) {
    return rounded(load<F32>(x)) | rounded(load<F32>(x + depth_stride)) << 16;
  }
  static UNIRL_ALWAYS_INLINE uint32_t one(const float* x, int64_t depth_stride, int64_t depth) {
    return rounded(splat(x[0]))[0] | (depth > 1 ? rounded(splat(x[depth_stride]))[0] << 16 : 0);
  }
};

struct FromBFloat16 {
  typedef uint16_t Storage;
  static UNIRL_ALWAYS_INLINE U32 along(const uint16_t* x) { return load<U32>(x); }
  static UNIRL_ALWAYS_INLINE U32 across(const uint16_t* x, int64_t depth_stride) {
    const U16Half next = load<U16Half>(x + depth_stride);
    return __builtin_convertvector(load<U16Half>(x), U32) | __builtin_convertvector(next, U32) << 16;
  }
  static UNIRL_ALWAYS_INLINE uint32_t one(const uint16_t* x, int64_t depth_stride, int64_t depth) {
    return x[0] | (depth > 1 ? uint32_t{x[depth_stride]} << 16 : 0);
  }
};

#else
constexpr int UNIT_DEPTH = 1;

template <class Self, class Element>
struct Widened {
  typedef Element Storage;
  static UNIRL_ALWAYS_INLINE U32 across(const Element* x, int64_t) { return Self::along(x); }
  static UNIRL_ALWAYS_INLINE uint32_t one(const Element* x, int64_t, int64_t) {
    const Element lanes[LANES] = {*x};
    return Self::along(lanes)[0];
  }
};

struct FromFloat32 : Widened<FromFloat32, float> {
  static UNIRL_ALWAYS_INLINE U32 along(const float* x) { return load<U32>(x); }
};

struct FromBFloat16 : Widened<FromBFloat16, uint16_t> {
  static UNIRL_ALWAYS_INLINE U32 along(const uint16_t* x) {
    return __builtin_convertvector(load<U16Half>(x), U32) << 16;
  }
};

struct FromFloat16 : Widened<FromFloat16, uint16_t> {
  static UNIRL_ALWAYS_INLINE U32 along(const uint16_t* x) { return (U32)Float16::widened(x); }
};
#endif

typedef uint32_t U32Half __attribute__((vector_size(UNIRL_SIMD_BYTES / 2)));

#if UNIRL_SIMD_BYTES == 64
UNIRL_ALWAYS_INLINE U32 interleaved_low(U32 a, U32 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
UNIRL_ALWAYS_INLINE U32 interleaved_high(U32 a, U32 b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
UNIRL_ALWAYS_INLINE U32Half low(U32 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
UNIRL_ALWAYS_INLINE U32Half high(U32 x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
#else
UNIRL_ALWAYS_INLINE U32 interleaved_low(U32 a, U32 b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
UNIRL_ALWAYS_INLINE U32 interleaved_high(U32 a, U32 b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
UNIRL_ALWAYS_INLINE U32Half low(U32 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
UNIRL_ALWAYS_INLINE U32Half high(U32 x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }
#endif

// LANES vectors of LANES elements. A round interleaves vectors i and i + LANES / 2; after log2(LANES) rounds element k of
// vector i is element i of vector k.
UNIRL_ALWAYS_INLINE void transpose(U32 (&x)[LANES]) {
  UNIRL_UNROLL for (int round = 1; round < LANES; round *= 2) {
    U32 y[LANES];
    UNIRL_UNROLL for (int i = 0; i < LANES / 2; ++i) {
      y[2 * i] = interleaved_low(x[i], x[i + LANES / 2]);
      y[2 * i + 1] = interleaved_high(x[i], x[i + LANES / 2]);
    }
    UNIRL_UNROLL for (int i = 0; i < LANES; ++i) x[i] = y[i];
  }
}

// Destination of LANES lanes of a slice, one unit of each at a time: two panels of TILE_ROWS lanes.
struct RowPanels {
  uint32_t* to;
  int64_t next_panel;
  RowPanels(uint32_t* panels, int64_t lane, int64_t, int64_t units)
      : to(panels + lane * units), next_panel(TILE_ROWS * units) {}
  UNIRL_ALWAYS_INLINE void put(int64_t unit, U32 x) const {
    store(to + unit * TILE_ROWS, low(x));
    store(to + unit * TILE_ROWS + next_panel, high(x));
  }
};

// Destination of LANES lanes: a panel of COLUMNS lanes. The last panel has the remaining lanes, in whole vectors.
template <int64_t COLUMNS>
struct ColumnPanels {
  uint32_t* to;
  int64_t width;
  ColumnPanels(uint32_t* panels, int64_t lane, int64_t lanes, int64_t units) {
    const int64_t panel = lane - lane % COLUMNS, rest = (lanes - panel + LANES - 1) / LANES * LANES;
    width = rest < COLUMNS ? rest : COLUMNS;
    to = panels + panel * units + (lane - panel);
  }
  UNIRL_ALWAYS_INLINE void put(int64_t unit, U32 x) const { store(to + unit * width, x); }
};

// Packs into panels: whole vectors if lanes or depth are contiguous, the rest unit by unit.
template <class From, class Panels>
void pack_as(const Slice& from, uint32_t* to) {
  const int64_t units = (from.depth + UNIT_DEPTH - 1) / UNIT_DEPTH, whole_units = from.depth / UNIT_DEPTH;
  const int64_t lane_stride = from.lane_stride, depth_stride = from.depth_stride;
  for (int64_t lane = 0; lane < from.lanes; lane += LANES) {
    const Panels panels(to, lane, from.lanes, units);
    const auto* const x = static_cast<const typename From::Storage*>(from.data) + lane * lane_stride;
    const int64_t lanes = from.lanes - lane < LANES ? from.lanes - lane : LANES;
    int64_t unit = 0;
    if (lanes == LANES && lane_stride == 1) {
      for (; unit < whole_units; ++unit) {
        panels.put(unit, From::across(x + unit * UNIT_DEPTH * depth_stride, depth_stride));
      }
    } else if (lanes == LANES && depth_stride == 1) {
      for (; unit + LANES <= whole_units; unit += LANES) {
        U32 block[LANES];
        UNIRL_UNROLL for (int i = 0; i < LANES; ++i) block[i] = From::along(x + i * lane_stride + unit * UNIT_DEPTH);
        transpose(block);
        UNIRL_UNROLL for (int i = 0; i < LANES; ++i) panels.put(unit + i, block[i]);
      }
    }
    for (; unit < units; ++unit) {
      uint32_t packed[LANES] = {};
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t deep = unit * UNIT_DEPTH;
        packed[i] = From::one(x + i * lane_stride + deep * depth_stride, depth_stride, from.depth - deep);
      }
      panels.put(unit, load<U32>(packed));
    }
  }
}

// Packs into lines, [lane][unit], in the same way.
template <class From>
void pack_lines_as(const Slice& from, uint32_t* to) {
  const int64_t units = (from.depth + UNIT_DEPTH - 1) / UNIT_DEPTH, whole_units = from.depth / UNIT_DEPTH;
  const int64_t lane_stride = from.lane_stride, depth_stride = from.depth_stride;
  for (int64_t lane = 0; lane < from.lanes; lane += LANES) {
    const auto* const x = static_cast<const typename From::Storage*>(from.data) + lane * lane_stride;
    const int64_t lanes = from.lanes - lane < LANES ? from.lanes - lane : LANES;
    uint32_t* const lines = to + lane * units;
    int64_t unit = 0;
    if (lanes == LANES && lane_stride == 1) {
      for (; unit + LANES <= whole_units; unit += LANES) {
        U32 block[LANES];
        UNIRL_UNROLL for (int i = 0; i < LANES; ++i) {
          block[i] = From::across(x + (unit + i) * UNIT_DEPTH * depth_stride, depth_stride);
        }
        transpose(block);
        UNIRL_UNROLL for (int i = 0; i < LANES; ++i) store(lines + i * units + unit, block[i]);
      }
    } else if (depth_stride == 1) {
      for (; unit + LANES <= whole_units; unit += LANES) {
        for (int64_t i = 0; i < lanes; ++i) {
          store(lines + i * units + unit, From::along(x + i * lane_stride + unit * UNIT_DEPTH));
        }
      }
    }
    for (int64_t i = 0; i < lanes; ++i) {
      for (int64_t rest = unit; rest < units; ++rest) {
        const int64_t deep = rest * UNIT_DEPTH;
        lines[i * units + rest] = From::one(x + i * lane_stride + deep * depth_stride, depth_stride, from.depth - deep);
      }
    }
  }
}

struct AsRowPanels {
  template <class From>
  static void pack(const Slice& from, uint32_t* to) { pack_as<From, RowPanels>(from, to); }
};

template <int64_t COLUMNS>
struct AsColumnPanels {
  template <class From>
  static void pack(const Slice& from, uint32_t* to) { pack_as<From, ColumnPanels<COLUMNS>>(from, to); }
};

struct AsLines {
  template <class From>
  static void pack(const Slice& from, uint32_t* to) { pack_lines_as<From>(from, to); }
};

template <class As>
void pack(const Slice& from, uint32_t* to) {
  switch (from.format) {
    case Format::FP32: return As::template pack<FromFloat32>(from, to);
    case Format::BF16: return As::template pack<FromBFloat16>(from, to);
#if !defined(UNIRL_BF16_DOT)
    case Format::FP16: return As::template pack<FromFloat16>(from, to);
#endif
    default: return;
  }
}

}  // namespace unirl::cpu::UNIRL_ISA
