#include "rows.h"

#include <string.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace unirl::cpu {
namespace {

// A thread is not woken for less than this many logits (about 5 us of work).
constexpr int64_t LOGITS_PER_THREAD = 32768;

// Rows per thread from which each thread takes whole rows: idle threads at the end then cost at most a quarter.
constexpr int64_t ROWS_PER_THREAD = 4;

// The target's logit, raw and mapped (see row_math.h). Of a target that is elsewhere, probability 0.
struct Target {
  double x = 0, u = -INFINITY;
};

// One call's way over its rows. A Step is what stands between the two sweeps of a row:
//   typedef ... Sums               of the first sweep: Moments<double>, or Observed<double>
//   static constexpr bool READS    whether it wants them
//   static constexpr bool WRITES   whether its terms are for the second sweep
//   GradientTerms<double> operator()(int64_t row, readout, sums, target) const
//   void absent(int64_t row, double value) const   what a row returns that is not read
template <class Step>
class Pass {
  typedef typename Step::Sums Sums;
  static constexpr bool OBSERVES = std::is_same_v<Sums, Observed<double>>;

 public:
  Pass(const Rows& rows, const Matrix& d_logits, const Step& step)
      : rows_(rows),
        d_logits_(d_logits),
        step_(step),
        kernels_(kernels_for(rows.format)),
        segments_((rows.vocab + SEGMENT - 1) / SEGMENT) {}

  void run() {
    std::vector<int64_t> present, absent;
    for (int64_t row = 0; row < rows_.batch * rows_.length; ++row) {
      (is_read(rows_.target[row], rows_.vocab) ? present : absent).push_back(row);
    }
    const int64_t n = present.size(), threads = thread_count();
    const int64_t rows_per_thread = std::max<int64_t>(1, LOGITS_PER_THREAD / rows_.vocab);
    const auto here = [](int64_t n, const auto& body) { body(0, n); };
    const auto on_all_threads = [](int64_t n, const auto& body) { parallel_for(n, 1, body); };
    if (n >= ROWS_PER_THREAD * threads || n * rows_.vocab < 2 * LOGITS_PER_THREAD) {
      parallel_for(n, rows_per_thread, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) together(&present[i], 1, here);
      });
    } else {
      // Few rows: their segments are spread over the threads, about a row for each, so that the second sweep still
      // finds in the cache what the first one read.
      for (int64_t i = 0; i < n; i += threads) together(&present[i], std::min(threads, n - i), on_all_threads);
    }
    parallel_for(absent.size(), rows_per_thread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) leave_out(absent[i]);
    });
  }

 private:
  // n rows at a time. Loop: how to run over their segments.
  template <class Loop>
  void together(const int64_t* rows, int64_t n, const Loop& loop) const {
    std::vector<Sums> sums(Step::READS ? n * segments_ : 0);
    if (Step::READS) {
      loop(n * segments_, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sums[i] = sums_of(rows[i / segments_], i % segments_);
      });
    }
    std::vector<GradientTerms<double>> terms(n);
    for (int64_t i = 0; i < n; ++i) terms[i] = finish(rows[i], sums.data() + i * segments_);
    if (Step::WRITES) {
      loop(n * segments_, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) gradient(rows[i / segments_], i % segments_, terms[i / segments_]);
      });
      for (int64_t i = 0; i < n; ++i) {
        const int64_t y = rows_.target[rows[i]];
        if (y != ELSEWHERE) kernels_.write(at(d_logits_, rows[i], y), terms[i].target);
      }
    }
  }

  // Zeros for an ignored row; NaN for one whose target is no column, which is all bits set in every format.
  void leave_out(int64_t row) const {
    const bool ignored = rows_.target[row] == rows_.ignore;
    step_.absent(row, ignored ? 0 : NAN);
    if (Step::WRITES) memset(at(d_logits_, row, 0), ignored ? 0 : 0xff, rows_.vocab * kernels_.bytes);
  }

  GradientTerms<double> finish(int64_t row, const Sums* segments) const {
    const Readout<double> readout = readout_of(row);
    Sums sums{};
    if (Step::READS) {
      sums = segments[0];
      for (int64_t i = 1; i < segments_; ++i) sums = merge(sums, segments[i], readout.kappa);
      if constexpr (OBSERVES) {
        const void* const x = at(rows_.logits, row, sums.at);
        sums.at += kernels_.find(x, size_of(sums.at / SEGMENT), sums.top, readout);
      }
    }
    Target target;
    if (rows_.target[row] != ELSEWHERE) {
      const void* const x = at(rows_.logits, row, rows_.target[row]);
      target = {kernels_.read(x), kernels_.u(x, readout)};
    }
    return step_(row, readout, sums, target);
  }

  Sums sums_of(int64_t row, int64_t segment) const {
    const int64_t begin = segment * SEGMENT;
    const void* const x = at(rows_.logits, row, begin);
    if constexpr (OBSERVES) {
      Sums sums = kernels_.observe(x, size_of(segment), readout_of(row));
      sums.at = begin;
      return sums;
    } else {
      return kernels_.moments(x, size_of(segment), readout_of(row));
    }
  }

  void gradient(int64_t row, int64_t segment, const GradientTerms<double>& terms) const {
    const int64_t begin = segment * SEGMENT;
    void* d_x = at(d_logits_, row, begin);
    if (terms.constant == 0 && terms.linear == 0) {
      memset(d_x, 0, size_of(segment) * kernels_.bytes);
    } else {
      kernels_.gradient(at(rows_.logits, row, begin), d_x, size_of(segment), readout_of(row), terms);
    }
  }

  void* at(const Matrix& matrix, int64_t row, int64_t column) const {
    const int64_t offset =
        row / rows_.length * matrix.batch_stride + row % rows_.length * matrix.token_stride + column;
    return static_cast<char*>(matrix.data) + offset * kernels_.bytes;
  }

  int64_t size_of(int64_t segment) const { return std::min(SEGMENT, rows_.vocab - segment * SEGMENT); }

  Readout<double> readout_of(int64_t row) const {
    const bool own = rows_.row_temperature.data != nullptr;
    return make_readout(rows_.scale, rows_.softcap, own ? rows_.row_temperature.get(row) : rows_.temperature);
  }

  const Rows& rows_;
  const Matrix& d_logits_;
  const Step& step_;
  const SegmentKernels& kernels_;
  const int64_t segments_;
};

void set(const StatisticsColumns& out, int64_t row, const Statistics<double>& statistics) {
  out.logp.set(row, statistics.logp);
  out.entropy.set(row, statistics.entropy);
  out.lse.set(row, statistics.lse);
}

void set(const MeasuredColumns& out, int64_t row, const Statistics<double>& at, const RowMoments<double>& moments) {
  set(out.statistics, row, at);
  out.moments.top.set(row, moments.top);
  out.moments.s_minus_1.set(row, moments.s_minus_1);
  out.moments.sz.set(row, moments.sz);
  out.moments.u_target.set(row, moments.u_target);
}

void measure(
    const MeasuredColumns& out,
    int64_t row,
    const Readout<double>& readout,
    const Moments<double>& sums,
    const Target& target) {
  const RowMoments<double> moments = row_moments(sums, readout, target.u);
  set(out, row, unirl::finish(moments, readout.kappa, log1p(moments.s_minus_1)), moments);
}

struct Measure {
  typedef Moments<double> Sums;
  static constexpr bool READS = true, WRITES = false;
  const MeasuredColumns& out;

  GradientTerms<double> operator()(
      int64_t row, const Readout<double>& readout, const Moments<double>& sums, const Target& target) const {
    measure(out, row, readout, sums, target);
    return {};
  }
  void absent(int64_t row, double value) const {
    set(out, row, {value, value, value}, {value, value, value, value});
  }
};

struct Observe {
  typedef Observed<double> Sums;
  static constexpr bool READS = true, WRITES = false;
  const MeasuredColumns& measured;
  const ObservationColumns& out;
  int64_t vocab;

  GradientTerms<double> operator()(
      int64_t row, const Readout<double>& readout, const Observed<double>& sums, const Target& target) const {
    measure(measured, row, readout, sums, target);
    set(row, observe(sums, readout, vocab));
    return {};
  }
  void absent(int64_t row, double value) const {
    Measure{measured}.absent(row, value);
    set(row, {value, value, value, -1});
  }
  void set(int64_t row, const Observations<double>& found) const {
    out.log_sum_sq_probs.set(row, found.log_sum_sq_probs);
    out.mean_logit.set(row, found.mean_logit);
    out.largest.set(row, found.largest);
    out.argmax[row] = found.argmax;
  }
};

struct Backward {
  typedef Moments<double> Sums;
  static constexpr bool READS = false, WRITES = true;
  const MomentColumns& moments;
  const StatisticsColumns& d;

  GradientTerms<double> operator()(
      int64_t row, const Readout<double>& readout, const Moments<double>&, const Target& target) const {
    const RowMoments<double> of_row = {
        moments.top.get(row), moments.s_minus_1.get(row), moments.sz.get(row), moments.u_target.get(row)};
    const Coefficients<double> coefficients = {d.logp.get(row), d.entropy.get(row), d.lse.get(row)};
    const double log_s = log1p(of_row.s_minus_1);
    const Statistics<double> statistics = unirl::finish(of_row, readout.kappa, log_s);
    return gradient_terms(statistics, coefficients, readout, of_row.top, log_s, target.x);
  }
  void absent(int64_t, double) const {}
};

struct Fuse {
  typedef Moments<double> Sums;
  static constexpr bool READS = true, WRITES = true;
  const ProgramInputs& from;
  const FusedColumns& out;
  int64_t n_rows;

  GradientTerms<double> operator()(
      int64_t row, const Readout<double>& readout, const Moments<double>& sums, const Target& target) const {
    const RowMoments<double> moments = row_moments(sums, readout, target.u);
    const double log_s = log1p(moments.s_minus_1);
    const Statistics<double> statistics = unirl::finish(moments, readout.kappa, log_s);
    set(out.statistics, row, statistics);
    double results[MAX_LIVE], outputs[N_OUTPUTS];
    run_program(from.program, [&](int at) { return input(at, row); }, results, outputs);
    out.loss.set(row, outputs[0]);
    const Coefficients<double> d = {outputs[1], outputs[2], outputs[3]};
    return gradient_terms(statistics, d, readout, moments.top, log_s, target.x);
  }
  // Statistics as they are returned, rounded: given back as old_logp they make a ratio of exactly 1.
  double input(int at, int64_t row) const {
    if (at >= FIRST_PARAM) return from.params[at - FIRST_PARAM];
    if (at >= FIRST_FIELD) return from.fields.get((at - FIRST_FIELD) * n_rows + row);
    const StatisticsColumns& returned = out.statistics;
    return (at == LOGP ? returned.logp : at == ENTROPY ? returned.entropy : returned.lse).get(row);
  }
  void absent(int64_t row, double value) const {
    out.loss.set(row, value);
    set(out.statistics, row, {value, value, value});
  }
};

}  // namespace

void token_stats(const Rows& rows, const MeasuredColumns& out) { Pass(rows, {}, Measure{out}).run(); }

void token_observations(const Rows& rows, const MeasuredColumns& out, const ObservationColumns& observations) {
  Pass(rows, {}, Observe{out, observations, rows.vocab}).run();
}

void token_stats_backward(
    const Rows& rows, const MomentColumns& moments, const StatisticsColumns& d, const Matrix& d_logits) {
  Pass(rows, d_logits, Backward{moments, d}).run();
}

void fused_loss(const Rows& rows, const ProgramInputs& inputs, const Matrix& d_logits, const FusedColumns& out) {
  Pass(rows, d_logits, Fuse{inputs, out, rows.batch * rows.length}).run();
}

}  // namespace unirl::cpu
