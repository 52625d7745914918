#include "rows.h"
#include "slice.h"

namespace unirl::cuda {
namespace {

// Enough blocks to fill a device, but few enough that a factor of 1 costs only microseconds.
constexpr int64_t MAX_BLOCKS = 1024;

template <class Format>
__global__ void __launch_bounds__(THREADS)
    multiply(Matrix matrix, int64_t length, int64_t rows, int vocab, const float* factor) {
  const float by = *factor;
  if (by == 1) return;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    auto* const x = static_cast<typename Format::Storage*>(matrix.data) + row / length * matrix.batch_stride +
                    row % length * matrix.token_stride;
    store<Format>(x, vocab, [=](int k, auto& of) {
      constexpr int N = sizeof of / sizeof *of;
      if constexpr (N == 1) {
        of[0] = Format::widen(x[k]);
      } else {
        Format::unpack(*reinterpret_cast<const uint4*>(x + k), of);
      }
      for (float& value : of) value *= by;
    });
  }
}

}  // namespace

std::string scale(
    const Matrix& x,
    int64_t batch,
    int64_t length,
    int64_t vocab,
    const float* factor,
    cudaStream_t stream) {
  const int64_t rows = batch * length;
  if (rows == 0) return "";
  const unsigned blocks = static_cast<unsigned>(rows < MAX_BLOCKS ? rows : MAX_BLOCKS);
  const int size = static_cast<int>(vocab);
  switch (x.format) {
    case Format::FP32: multiply<Float32><<<blocks, THREADS, 0, stream>>>(x, length, rows, size, factor); break;
    case Format::BF16: multiply<BFloat16><<<blocks, THREADS, 0, stream>>>(x, length, rows, size, factor); break;
    case Format::FP16: multiply<Float16><<<blocks, THREADS, 0, stream>>>(x, length, rows, size, factor); break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : failure("scale", error);
}

}  // namespace unirl::cuda
