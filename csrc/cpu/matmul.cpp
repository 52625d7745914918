#include "matmul.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "dispatch.h"
#include "matmul_variants.h"
#include "parallel.h"

namespace unirl::cpu {
namespace {

// A factor of at most this many units (4 MiB) is packed once and stays in cache while the other factor streams past.
constexpr int64_t STAYING_UNITS = int64_t{1} << 20;
constexpr int64_t STAYING_DEPTH = STAYING_UNITS / 128;

// Lanes of the streaming factor that are packed at a time.
constexpr int64_t PASSING_LANES = 192;

// The largest tile of a thread if neither factor stays.
constexpr int64_t MOST_ROWS = 512, MOST_COLUMNS = 960;

// The least work for which a thread is started, in multiplications (about 5 us).
constexpr int64_t MULTIPLICATIONS_PER_THREAD = int64_t{1} << 19;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How the result is cut into tiles, and which factor is packed over its whole depth and reused for all tiles.
struct Plan {
  int64_t tile_rows, tile_columns, threads;
  bool rows_stay, columns_stay;
};

// Cuts the result into tiles for all threads. Each thread packs the factors of its tiles: a grid of a by b tiles packs
// the rows b times and the columns a times.
void cut_into_grid(Plan& plan, int64_t rows, int64_t columns, int64_t lanes) {
  int64_t down = 1, across = plan.threads;
  for (int64_t i = 2; i <= plan.threads; ++i) {
    const int64_t j = ceil_div(plan.threads, i);
    if (j * rows + i * columns < across * rows + down * columns) down = i, across = j;
  }
  // If tiles would be too large, make more of them, still a multiple of the threads.
  down *= ceil_div(rows, down * MOST_ROWS);
  across *= ceil_div(columns, across * MOST_COLUMNS);
  plan.tile_rows = round_up(ceil_div(rows, down), lanes / 2);
  plan.tile_columns = round_up(ceil_div(columns, across), lanes);
}

Plan plan_for(const Matmul& matmul, const PanelKernels& kernels) {
  const int64_t rows = matmul.rows.lanes, columns = matmul.columns.lanes, depth = matmul.rows.depth;
  const int64_t units = std::max<int64_t>(ceil_div(depth, kernels.unit_depth), 1);
  const int64_t staying = STAYING_UNITS / units / kernels.lanes * kernels.lanes;
  const double work = double(rows) * double(columns) * double(depth) / double(MULTIPLICATIONS_PER_THREAD);
  Plan plan = {};
  plan.threads = std::clamp<int64_t>(int64_t(std::min(work, 1e6)), 1, thread_count());
  if (units > STAYING_DEPTH || depth > std::max(rows, columns)) {
    cut_into_grid(plan, rows, columns, kernels.lanes);
  } else if (columns >= rows) {
    plan.rows_stay = true;
    plan.tile_rows = std::min(staying, round_up(rows, kernels.lanes));
    plan.tile_columns = PASSING_LANES;
  } else {
    plan.columns_stay = true;
    plan.tile_columns = std::min(staying, round_up(columns, kernels.lanes));
    plan.tile_rows = PASSING_LANES;
  }
  return plan;
}

Slice part(const Slice& x, int64_t lane, int64_t lanes, int64_t deep, int64_t depth) {
  const int64_t bytes = x.format == Format::FP32 ? 4 : 2;
  const char* const data = static_cast<const char*>(x.data) + (lane * x.lane_stride + deep * x.depth_stride) * bytes;
  return {x.format, data, x.lane_stride, x.depth_stride, std::min(lanes, x.lanes - lane),
          std::min(depth, x.depth - deep)};
}

// A thread's panels of one factor.
class Packed {
 public:
  // lanes: lanes of a tile; block: the depth that is packed at a time.
  Packed(const Slice& from, int64_t lanes, int64_t block, bool stays, const PanelKernels& kernels)
      : from_(from), tile_lanes_(lanes), block_(block), stays_(stays), kernels_(kernels) {
    const int64_t most = round_up(std::min(lanes, from.lanes), kernels.lanes);
    const int64_t depth = stays ? from.depth : std::min(block, from.depth);
    const size_t units = most * ceil_div(depth, kernels.unit_depth);
    memory_.reset(static_cast<uint32_t*>(::operator new(units * sizeof(uint32_t), ALIGNMENT)));
  }

  // The panels of a tile, starting at this depth.
  const uint32_t* panels(int64_t tile, int64_t deep, void (*pack)(const Slice&, uint32_t*)) {
    const Slice source = part(from_, tile * tile_lanes_, tile_lanes_, deep, block_);
    uint32_t* to = memory_.get();
    if (stays_) to += deep / kernels_.unit_depth * round_up(source.lanes, kernels_.lanes);
    if (!stays_ || tile != tile_) pack(source, to);
    return to;
  }

  void finished(int64_t tile) { tile_ = tile; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  struct Release {
    void operator()(uint32_t* memory) const { ::operator delete(memory, ALIGNMENT); }
  };

  const Slice& from_;
  const int64_t tile_lanes_, block_;
  const bool stays_;
  const PanelKernels& kernels_;
  std::unique_ptr<uint32_t[], Release> memory_;
  int64_t tile_ = -1;  // the tile whose panels are complete
};

class Tiles {
 public:
  Tiles(const Matmul& matmul, const PanelKernels& kernels)
      : matmul_(matmul),
        kernels_(kernels),
        plan_(plan_for(matmul, kernels)),
        down_(ceil_div(matmul.rows.lanes, plan_.tile_rows)),
        across_(ceil_div(matmul.columns.lanes, plan_.tile_columns)) {
    // Blocks have about equal depth; all but the last are whole vectors.
    const int64_t blocks = std::max<int64_t>(ceil_div(matmul.rows.depth, kernels.block_units * kernels.unit_depth), 1);
    block_ = round_up(std::max<int64_t>(ceil_div(matmul.rows.depth, blocks), 1), kernels.unit_depth * kernels.lanes);
  }

  void run() {
    const int64_t threads = std::min(plan_.threads, down_ * across_);
    parallel_for(threads, 1, [&](int64_t, int64_t) { work(); });
  }

 private:
  // A free thread takes the next tile. The bits of a tile do not depend on the thread.
  void work() {
    Packed rows(matmul_.rows, plan_.tile_rows, block_, plan_.rows_stay, kernels_);
    Packed columns(matmul_.columns, plan_.tile_columns, block_, plan_.columns_stay, kernels_);
    for (int64_t i = next_++; i < down_ * across_; i = next_++) {
      if (plan_.columns_stay) {
        tile(rows, i % down_, columns, i / down_);
      } else {
        tile(rows, i / across_, columns, i % across_);
      }
    }
    if (kernels_.finish != nullptr) kernels_.finish();
  }

  void tile(Packed& rows, int64_t row_tile, Packed& columns, int64_t column_tile) const {
    const int64_t row = row_tile * plan_.tile_rows, column = column_tile * plan_.tile_columns;
    const int64_t depth = matmul_.rows.depth;
    const Tile to = {matmul_.result + row * matmul_.row_stride + column, matmul_.row_stride,
                     std::min(plan_.tile_rows, matmul_.rows.lanes - row),
                     std::min(plan_.tile_columns, matmul_.columns.lanes - column)};
    int64_t deep = 0;
    do {
      const uint32_t* const left = rows.panels(row_tile, deep, kernels_.pack_rows);
      const uint32_t* const right = columns.panels(column_tile, deep, kernels_.pack_columns);
      const int64_t units = ceil_div(std::min(block_, depth - deep), kernels_.unit_depth);
      const float* const bias = deep > 0 || matmul_.bias == nullptr ? nullptr : matmul_.bias + column;
      kernels_.multiply(left, right, units, bias, matmul_.add || deep > 0, to);
      deep += block_;
    } while (deep < depth);
    rows.finished(row_tile);
    columns.finished(column_tile);
  }

  const Matmul& matmul_;
  const PanelKernels& kernels_;
  const Plan plan_;
  const int64_t down_, across_;
  int64_t block_;
  std::atomic<int64_t> next_ = 0;
};

}  // namespace

void multiply(const Matmul& matmul) {
  if (matmul.rows.lanes == 0 || matmul.columns.lanes == 0) return;
  Tiles(matmul, *variant_of(matmul.columns.format)->kernels).run();
}

Format multiplied_as(Format format) {
  const MatmulVariant* const variant = variant_of(format);
  return variant != nullptr && variant->kernels->unit_depth == 2 ? Format::BF16 : Format::FP32;
}

std::string matmuls_unavailable(Format format) {
  if (variant_of(format) != nullptr) return "";
  return "matmuls need the instruction set avx2 or avx512, this is " + instruction_set();
}

}  // namespace unirl::cpu
