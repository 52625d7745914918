// Packing, and the register tile of matrix multiplication, once for every instruction set. Besides what simd.h asks
// for, a unit defines UNIRL_BF16_DOT where it multiplies bf16.
#pragma once

#include "../simd.h"
#include "panels.h"

#define UNIRL_UNROLL _Pragma("GCC unroll 16")

namespace unirl::cpu::UNIRL_ISA {

// 8 by 48 sums with AVX-512, 4 by 24 with AVX2. They fill the registers but for three vectors of the right factor and
// one element of the left, and 11 (7) loads go with 24 (12) multiplications.
constexpr int TILE_ROWS = LANES / 2;
constexpr int TILE_VECTORS = 3;
constexpr int TILE_COLUMNS = TILE_VECTORS * LANES;

// How elements become units. along: of LANES units' neighbours in memory, which are neighbours in depth.
// across: of LANES neighbours in memory, which are lanes. one: of depth elements, at most UNIT_DEPTH.
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

UNIRL_ALWAYS_INLINE F32 accumulated(F32 sum, uint32_t row, U32 columns) {
  return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(row)), (__m512bh)columns);
}
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

UNIRL_ALWAYS_INLINE F32 accumulated(F32 sum, uint32_t row, U32 columns) {
  float factor;
  memcpy(&factor, &row, sizeof factor);
  return sum + factor * (F32)columns;
}
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

// Each round moves one bit of an element's position from the number of its vector to that of its lane.
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

// Where LANES of a slice's lanes go: to two panels of TILE_ROWS,
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

// or into a panel of COLUMNS; the last one is as wide as its vectors.
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

// As [lane][unit].
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

// Sums of up to TILE_ROWS rows and WIDTH vectors of columns. Each is one chain over the depth, so that its bits depend
// on neither its position nor its neighbours.
template <int WIDTH, bool ADD>
UNIRL_ALWAYS_INLINE void register_tile(const uint32_t* rows, const uint32_t* columns, int64_t units,
                                       const F32 (&bias)[WIDTH], const Tile& to) {
  for (int64_t row = 0; row < to.rows && row < TILE_ROWS; ++row) {
    for (int v = 0; v < WIDTH; ++v) __builtin_prefetch(to.data + row * to.row_stride + v * LANES, 1);
  }
  F32 sum[TILE_ROWS][WIDTH];
  UNIRL_UNROLL for (int row = 0; row < TILE_ROWS; ++row) {
    UNIRL_UNROLL for (int v = 0; v < WIDTH; ++v) sum[row][v] = F32{};
  }
  for (int64_t unit = 0; unit < units; ++unit, rows += TILE_ROWS, columns += WIDTH * LANES) {
    U32 right[WIDTH];
    UNIRL_UNROLL for (int v = 0; v < WIDTH; ++v) right[v] = load<U32>(columns + v * LANES);
    UNIRL_UNROLL for (int row = 0; row < TILE_ROWS; ++row) {
      UNIRL_UNROLL for (int v = 0; v < WIDTH; ++v) sum[row][v] = accumulated(sum[row][v], rows[row], right[v]);
    }
  }
  UNIRL_UNROLL for (int row = 0; row < TILE_ROWS; ++row) {
    if (row < to.rows) {
      UNIRL_UNROLL for (int v = 0; v < WIDTH; ++v) {
        float* const x = to.data + row * to.row_stride + v * LANES;
        const F32 result = sum[row][v] + bias[v];
        store(x, ADD ? load<F32>(x) + result : result);
      }
    }
  }
}

// A register tile that reaches beyond the result's last column.
template <int WIDTH, bool ADD>
void edge_tile(const uint32_t* rows, const uint32_t* columns, int64_t units, const F32 (&bias)[WIDTH],
               const Tile& to) {
  float whole[TILE_ROWS][WIDTH * LANES];
  register_tile<WIDTH, false>(rows, columns, units, bias, {whole[0], WIDTH * LANES, to.rows, WIDTH * LANES});
  for (int64_t row = 0; row < to.rows && row < TILE_ROWS; ++row) {
    float* const x = to.data + row * to.row_stride;
    for (int64_t i = 0; i < to.columns; ++i) x[i] = ADD ? x[i] + whole[row][i] : whole[row][i];
  }
}

template <int WIDTH, bool ADD>
void multiply_panel(const uint32_t* rows, const uint32_t* columns, int64_t units, const float* bias, const Tile& to) {
  float values[WIDTH * LANES] = {};
  for (int64_t i = 0; bias != nullptr && i < to.columns; ++i) values[i] = bias[i];
  F32 vectors[WIDTH];
  UNIRL_UNROLL for (int v = 0; v < WIDTH; ++v) vectors[v] = load<F32>(values + v * LANES);
  for (int64_t row = 0; row < to.rows; row += TILE_ROWS) {
    const Tile tile = {to.data + row * to.row_stride, to.row_stride, to.rows - row, to.columns};
    if (to.columns < WIDTH * LANES) {
      edge_tile<WIDTH, ADD>(rows + row * units, columns, units, vectors, tile);
    } else {
      register_tile<WIDTH, ADD>(rows + row * units, columns, units, vectors, tile);
    }
  }
}

template <bool ADD>
void multiply_panels(const uint32_t* rows, const uint32_t* columns, int64_t units, const float* bias,
                     const Tile& to) {
  for (int64_t column = 0; column < to.columns; column += TILE_COLUMNS) {
    const int64_t left = to.columns - column;
    const Tile tile = {to.data + column, to.row_stride, to.rows, left < TILE_COLUMNS ? left : TILE_COLUMNS};
    const auto kernel = left > 2 * LANES ? multiply_panel<3, ADD>
                        : left > LANES   ? multiply_panel<2, ADD>
                                         : multiply_panel<1, ADD>;
    kernel(rows, columns + column * units, units, bias == nullptr ? nullptr : bias + column, tile);
  }
}

inline void multiply(const uint32_t* rows, const uint32_t* columns, int64_t units, const float* bias, bool add,
                     const Tile& to) {
  (add ? multiply_panels<true> : multiply_panels<false>)(rows, columns, units, bias, to);
}

// So many units of depth are summed in registers: panels of them stay in the second-level cache, and the result is
// read and written seldom enough. 192 to 512 are within 3 %.
constexpr int64_t BLOCK_UNITS = 320;

constexpr PanelKernels panels = {
    UNIT_DEPTH, LANES, BLOCK_UNITS, pack<AsRowPanels>, pack<AsColumnPanels<TILE_COLUMNS>>, multiply, nullptr};

#if UNIRL_SIMD_BYTES == 64
constexpr WidePacking wide_packing = {pack<AsLines>, pack<AsColumnPanels<WIDE_COLUMNS>>};
#endif

}  // namespace unirl::cpu::UNIRL_ISA
