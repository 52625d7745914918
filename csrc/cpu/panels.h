// The matmul functions of an instruction set: pack factors into panels, and multiply panels.
#pragma once

#include <stdint.h>

#include "segment.h"

namespace unirl::cpu {

// A factor of a matmul, or a part of it: lanes (rows of the left factor, columns of the right one) by depth, the
// dimension that is summed. Strides are in elements.
struct Slice {
  Format format;
  const void* data;
  int64_t lane_stride, depth_stride;
  int64_t lanes, depth;
};

// fp32; the stride of the columns is 1.
struct Tile {
  float* data;
  int64_t row_stride;
  int64_t rows, columns;
};

// A panel is an array of units of 32 bits, [unit][lane]. A unit is a float, or two bf16 that are neighbours in depth. A
// slice becomes consecutive panels, padded with zeros: lanes to a multiple of LANES, depth to whole units.
struct PanelKernels {
  int64_t unit_depth;   // elements in a unit
  int64_t lanes;        // LANES
  int64_t block_units;  // units of depth that are summed before they are added to the result
  void (*pack_rows)(const Slice& from, uint32_t* to);
  void (*pack_columns)(const Slice& from, uint32_t* to);
  // to = rows columns^T + bias, or with add the same added to it. bias: a value per column, or null. The memory of
  // columns is aligned to 64 bytes.
  void (*multiply)(const uint32_t* rows, const uint32_t* columns, int64_t units, const float* bias, bool add,
                   const Tile& to);
  void (*finish)();  // called by each thread after its last multiply; or null
};

// Columns of a panel for torch's brgemm (brgemm.h).
constexpr int64_t WIDE_COLUMNS = 64;

// The same units for brgemm: rows as [lane][unit], and columns in panels of WIDE_COLUMNS.
struct WidePacking {
  void (*rows)(const Slice& from, uint32_t* to);
  void (*columns)(const Slice& from, uint32_t* to);
};

#if defined(__x86_64__)
// fp32, bf16 and fp16, multiplied as fp32.
extern const PanelKernels avx512_panels, avx2_panels;
extern const WidePacking avx512_packing;
// bf16, and fp32 rounded to bf16. Subnormal numbers are taken as zero.
extern const PanelKernels avx512_bf16_panels;
extern const WidePacking avx512_bf16_packing;
#endif

}  // namespace unirl::cpu
