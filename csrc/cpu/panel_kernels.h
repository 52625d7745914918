// The register tile of matrix multiplication, once for every instruction set; see panel_packing.h.
#pragma once

#include "panel_packing.h"

namespace unirl::cpu::UNIRL_ISA {

// sum + row columns, in each lane; if a unit holds two bf16, both products are added.
#if defined(UNIRL_BF16_DOT)
UNIRL_ALWAYS_INLINE F32 accumulated(F32 sum, uint32_t row, U32 columns) {
  return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(row)), (__m512bh)columns);
}
#else
UNIRL_ALWAYS_INLINE F32 accumulated(F32 sum, uint32_t row, U32 columns) {
  float factor;
  memcpy(&factor, &row, sizeof factor);
  return sum + factor * (F32)columns;
}
#endif

// Sums of up to TILE_ROWS rows and WIDTH vectors of columns. Each sum is one chain over the depth, so its bits depend
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

// Units of depth that are summed in registers. Panels of this depth stay in the L2 cache, and the result is read and
// written rarely. 192 to 512 units are within 3 %.
constexpr int64_t BLOCK_UNITS = 320;

constexpr PanelKernels panels = {
    UNIT_DEPTH, LANES, BLOCK_UNITS, pack<AsRowPanels>, pack<AsColumnPanels<TILE_COLUMNS>>, multiply, nullptr};

#if UNIRL_SIMD_BYTES == 64
constexpr WidePacking wide_packing = {pack<AsLines>, pack<AsColumnPanels<WIDE_COLUMNS>>};
#endif

}  // namespace unirl::cpu::UNIRL_ISA
