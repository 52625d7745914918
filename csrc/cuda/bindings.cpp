// The functions of unirl_kernels._cuda: they do the checks for memory safety, unwrap tensors and launch kernels.
#include "../row_bindings.h"
#include "bindings.h"
#include "rows.h"

namespace unirl {
namespace {

using cuda::Format;

// Throws the error that a launch reports, if any.
void check(const std::string& failure) {
  if (!failure.empty()) throw std::runtime_error(failure);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Makes the tensor's device the current one for the lifetime of this object. Sets nothing if it already is: setting a
// device also makes a context on it, which takes memory.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : stream(static_cast<cudaStream_t>(current_stream(x.device()))) {
    check(cudaGetDevice(&before_));
    changed_ = before_ != x.device().index;
    if (changed_) check(cudaSetDevice(x.device().index));
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

  const cudaStream_t stream;  // torch's current stream

 private:
  int before_ = 0;
  bool changed_ = false;
};

Format format_of(const Tensor& x) {
  const Dtype dtype = x.dtype();
  if (dtype == FLOAT) return Format::FP32;
  if (dtype == BFLOAT16) return Format::BF16;
  if (dtype == HALF) return Format::FP16;
  throw std::invalid_argument("logits of backend 'cuda' must be float32, bfloat16 or float16, got " + name_of(dtype) +
                              "; Plan(backend='eager') takes float64");
}

struct Cuda {
  using Rows = cuda::Rows;
  using Matrix = cuda::Matrix;
  using StatisticsColumns = cuda::StatisticsColumns;
  using MomentColumns = cuda::MomentColumns;
  using MeasuredColumns = cuda::MeasuredColumns;
  using GradientColumns = cuda::GradientColumns;
  using ProgramInputs = cuda::ProgramInputs;
  using FusedColumns = cuda::FusedColumns;
  static constexpr auto token_stats = &cuda::token_stats;
  static constexpr auto token_stats_backward = &cuda::token_stats_backward;
  static constexpr auto fused_loss = &cuda::fused_loss;

  static Dtype row_dtype(const Tensor&) { return FLOAT; }

  static Matrix matrix(const Tensor& x, const Tensor& logits, const char* name) {
    require_dense(logits, "logits");
    require(logits.is_cuda(), "logits must be on a CUDA device, got ", logits.device());
    require_rows(x, logits, name);
    const bool rounded = x.dtype() == BFLOAT16 && logits.dtype() == FLOAT;
    require(rounded || x.dtype() == logits.dtype(), name, " must be ", logits.dtype(),
            " like logits, or BFloat16 for Float, got ", x.dtype());
    return {x.data_ptr(), x.stride(0), x.stride(1), format_of(x)};
  }

  static float* column(const OptionalTensor& x, const Tensor& logits, const char* name) {
    if (!x) return nullptr;
    require_per_row(*x, logits, FLOAT, name);
    return x->data_ptr<float>();
  }

  static float* fields(const Tensor& x) { return x.data_ptr<float>(); }

  static Rows rows(const Tensor& logits, const Tensor& target, int64_t ignore, const ReadoutArgs& readout) {
    const Matrix of = matrix(logits, logits, "logits");
    Rows rows = rows_without_logits<Rows>(logits, target, ignore, readout, column);
    rows.logits = of;
    return rows;
  }

  template <class Work>
  static void run(const Tensor& logits, const Work& work) {
    const OnDevice on(logits);
    check(work(on.stream));
  }
};

void scale_(const Tensor& x, const Tensor& factor) {
  require_dense(factor, "factor");
  require_dense(x, "x");
  require(factor.dtype() == FLOAT && factor.numel() == 1 && factor.device() == x.device(),
          "factor must be one float32 number on ", x.device(), ", got ", factor.dtype(), " ", factor.sizes(),
          " on ", factor.device());
  require_memory(factor, "factor");
  const cuda::Matrix of = Cuda::matrix(x, x, "x");
  const OnDevice on(x);
  check(cuda::scale(of, x.size(0), x.size(1), x.size(2), factor.data_ptr<float>(), on.stream));
}

}  // namespace

void cuda::bind(pybind11::module_& m) {
  RowBindings<Cuda>::bind(m);
  m.def("scale_", &unirl::scale_, py::arg("x"), py::arg("factor"));
}

}  // namespace unirl
