#include "rows.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "rows_program.h"

namespace unirl::cpu {
namespace {

// The least work for which a thread is started, in logits (about 5 us).
constexpr int64_t LOGITS_PER_THREAD = 32768;

// From this many rows per thread on, each thread takes whole rows. Idle threads at the end then cost at most a quarter.
constexpr int64_t ROWS_PER_THREAD = 4;

// 16-bit gradients of at least this many bytes are written past the caches, which could not hold them anyway. This
// saves reading their memory before the write. In fp32 the exponentials are already in that memory.
constexpr int64_t STREAMED_BYTES = int64_t{32} << 20;

// The target's logit, raw and mapped (see row_math.h). u = -inf, probability 0, for a target in another shard.
struct Target {
  double x = 0, u = -INFINITY;
};

// Short rows are processed in groups of at most GROUP_ROWS rows and GROUP_LOGITS logits.
constexpr int64_t GROUP_ROWS = ROWS_AT_ONCE, GROUP_LOGITS = 8192;

// Result of the first sweep for a row, and the row's readout.
template <class Sums>
struct RowSums {
  Readout<double> readout;
  Sums sums;
  Target target;
};

// One pass over all rows of a call. Step is the code between the two sweeps of n rows:
//   typedef ... Sums               result type of the first sweep: Moments<double> or Observed<double>
//   static constexpr bool READS    whether it needs the first sweep
//   static constexpr bool WRITES   whether it needs the second sweep
//   bool proportional() const      whether the gradient is proportional to the exponentials, except at the target
//   void operator()(const int64_t* rows, int64_t n, const RowSums<Sums>* of, GradientTerms<double>* terms) const
//   void absent(int64_t row, double value) const   sets the results of a row that is not read
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
        segments_((rows.vocab + SEGMENT - 1) / SEGMENT),
        keeps_(Step::READS && Step::WRITES && kernels_.exponentials != nullptr && rows.softcap <= 0 &&
               step.proportional()),
        streams_(keeps_ && rows.format != Format::FP32 && d_logits.data != rows.logits.data &&
                 rows.batch * rows.length * rows.vocab * kernels_.bytes >= STREAMED_BYTES),
        kept_per_row_(keeps_ && rows.format != Format::FP32 ? (rows.vocab + MOST_STEP - 1) / MOST_STEP * MOST_STEP
                                                            : 0) {}

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
      const int64_t group = std::clamp<int64_t>(GROUP_LOGITS / rows_.vocab, 1, GROUP_ROWS);
      // Allocated before any thread writes: without memory the logits stay as they are.
      std::vector<Work> works;
      works.reserve(threads);
      for (int64_t i = 0; i < std::min(threads, n); ++i) works.emplace_back(*this, group);
      std::atomic<int64_t> taken{0};
      parallel_for(n, rows_per_thread, [&](int64_t begin, int64_t end) {
        Work& work = works[taken++];
        for (int64_t i = begin; i < end; i += group) {
          together(&present[i], std::min(group, end - i), work, here);
        }
      });
    } else {
      // Few rows: their segments are spread over the threads. Each group has about one row per thread, so that the
      // second sweep finds the logits in the cache.
      Work work(*this, std::min({threads, GROUP_ROWS, n}));
      for (int64_t i = 0; i < n; i += GROUP_ROWS) {
        const int64_t rest = std::min(GROUP_ROWS, n - i), group = std::min(threads, rest);
        for (int64_t k = 0; k < rest; k += group) {
          together(&present[i + k], std::min(group, rest - k), work, on_all_threads);
        }
      }
    }
    parallel_for(absent.size(), rows_per_thread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) leave_out(absent[i]);
    });
  }

 private:
  // Memory for a group of rows.
  struct Work {
    std::vector<Sums> sums;  // one per segment
    std::vector<RowSums<Sums>> rows;
    std::vector<GradientTerms<double>> terms;
    std::unique_ptr<float[]> kept;  // exponentials

    Work(const Pass& pass, int64_t n)
        : sums(Step::READS ? n * pass.segments_ : 0),
          rows(n),
          terms(n),
          kept(new float[n * pass.kept_per_row_]) {}
  };

  // Processes a group of n rows. loop runs over their segments.
  template <class Loop>
  void together(const int64_t* rows, int64_t n, Work& work, const Loop& loop) const {
    // Before the sweeps: exponentials may overwrite the logits.
    for (int64_t i = 0; i < n; ++i) work.rows[i] = {readout_of(rows[i]), {}, target_of(rows[i])};
    if (Step::READS) {
      loop(n * segments_, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t k = i / segments_, segment = i % segments_;
          work.sums[i] = sums_of(rows[k], segment, work.rows[k].readout, kept(work, rows[k], k, segment));
        }
      });
      for (int64_t i = 0; i < n; ++i) merge_segments(rows[i], &work.sums[i * segments_], work.rows[i]);
    }
    step_(rows, n, work.rows.data(), work.terms.data());
    if (Step::WRITES) {
      for (int64_t i = 0; i < n; ++i) {
        GradientTerms<double>& terms = work.terms[i];
        for (double* value : {&terms.reference, &terms.constant, &terms.linear, &terms.target}) {
          if (*value != *value) *value = NAN;  // a caller's NaN may have bits that BFloat16::rounded does not keep
        }
      }
      // From the end: the logits that the first sweep read last are still in the cache.
      loop(n * segments_, [&](int64_t begin, int64_t end) {
        for (int64_t i = end - 1; i >= begin; --i) {
          const int64_t k = i / segments_, segment = i % segments_;
          const double m = keeps_ ? double(work.sums[i].m) : 0;
          gradient(rows[k], segment, work.rows[k].readout, work.terms[k], kept(work, rows[k], k, segment), m);
        }
      });
      for (int64_t i = 0; i < n; ++i) {
        const int64_t y = rows_.target[rows[i]];
        if (y != ELSEWHERE) kernels_.write(at(d_logits_, rows[i], y), work.terms[i].target);
      }
    }
  }

  // Memory for the exponentials of a segment; null if they are not kept.
  float* kept(const Work& work, int64_t row, int64_t k, int64_t segment) const {
    if (!keeps_) return nullptr;
    if (kept_per_row_ == 0) return static_cast<float*>(at(d_logits_, row, segment * SEGMENT));
    return work.kept.get() + k * kept_per_row_ + segment * SEGMENT;
  }

  // Zeros for an ignored row. NaN for a row whose target is out of range; all bits set is NaN in every format.
  void leave_out(int64_t row) const {
    const bool ignored = rows_.target[row] == rows_.ignore;
    step_.absent(row, ignored ? 0 : NAN);
    if (Step::WRITES) memset(at(d_logits_, row, 0), ignored ? 0 : 0xff, rows_.vocab * kernels_.bytes);
  }

  void merge_segments(int64_t row, const Sums* segments, RowSums<Sums>& of) const {
    of.sums = segments[0];
    for (int64_t i = 1; i < segments_; ++i) of.sums = merge(of.sums, segments[i], of.readout.kappa);
    if constexpr (OBSERVES) {
      const void* const x = at(rows_.logits, row, of.sums.at);
      of.sums.at += kernels_.find(x, size_of(of.sums.at / SEGMENT), of.sums.top, of.readout);
    }
  }

  Target target_of(int64_t row) const {
    if (rows_.target[row] == ELSEWHERE) return {};
    const void* const x = at(rows_.logits, row, rows_.target[row]);
    return {kernels_.read(x), kernels_.u(x, readout_of(row))};
  }

  Sums sums_of(int64_t row, int64_t segment, const Readout<double>& readout, float* kept) const {
    const int64_t begin = segment * SEGMENT;
    const void* const x = at(rows_.logits, row, begin);
    if constexpr (OBSERVES) {
      Sums sums = kernels_.observe(x, size_of(segment), readout);
      sums.at = begin;
      return sums;
    } else {
      return kept != nullptr ? kernels_.exponentials(x, size_of(segment), readout, kept)
                             : kernels_.moments(x, size_of(segment), readout);
    }
  }

  // m: the largest u of the segment, to which its kept exponentials are relative.
  void gradient(
      int64_t row,
      int64_t segment,
      const Readout<double>& readout,
      const GradientTerms<double>& terms,
      const float* kept,
      double m) const {
    const int64_t begin = segment * SEGMENT;
    void* d_x = at(d_logits_, row, begin);
    if (terms.constant == 0 && terms.linear == 0) {
      memset(d_x, 0, size_of(segment) * kernels_.bytes);
    } else if (kept != nullptr) {
      const double shift = m == terms.reference ? 1 : exp(readout.kappa * (m - terms.reference));
      kernels_.scale(kept, d_x, size_of(segment), terms.constant * shift, streams_);
    } else {
      kernels_.gradient(at(rows_.logits, row, begin), d_x, size_of(segment), readout, terms);
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
  // If the gradient is proportional to the exponentials, the first sweep keeps them and the second multiplies them.
  const bool keeps_;
  const bool streams_;  // whether the gradient is written past the caches
  // Floats for a row's exponentials, which a cache holds until the second sweep; 0 if they are in the gradient's
  // memory.
  const int64_t kept_per_row_;
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

  bool proportional() const { return false; }
  void operator()(
      const int64_t* rows, int64_t n, const RowSums<Sums>* of, GradientTerms<double>*) const {
    for (int64_t i = 0; i < n; ++i) measure(out, rows[i], of[i].readout, of[i].sums, of[i].target);
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

  bool proportional() const { return false; }
  void operator()(
      const int64_t* rows, int64_t n, const RowSums<Sums>* of, GradientTerms<double>*) const {
    for (int64_t i = 0; i < n; ++i) {
      measure(measured, rows[i], of[i].readout, of[i].sums, of[i].target);
      set(rows[i], observe(of[i].sums, of[i].readout, vocab));
    }
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

  bool proportional() const { return false; }
  void operator()(
      const int64_t* rows, int64_t n, const RowSums<Sums>* of, GradientTerms<double>* terms) const {
    for (int64_t i = 0; i < n; ++i) terms[i] = terms_of(rows[i], of[i].readout, of[i].target);
  }
  GradientTerms<double> terms_of(int64_t row, const Readout<double>& readout, const Target& target) const {
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

  // Only the gradient of the entropy has a term with log p_j.
  bool proportional() const { return from.program.outputs[2] == ALWAYS_ZERO; }

  void operator()(
      const int64_t* rows, int64_t n, const RowSums<Sums>* of, GradientTerms<double>* terms) const {
    RowMoments<double> moments[ROWS_AT_ONCE];
    Statistics<double> statistics[ROWS_AT_ONCE];
    double log_s[ROWS_AT_ONCE];
    for (int64_t i = 0; i < n; ++i) {
      moments[i] = row_moments(of[i].sums, of[i].readout, of[i].target.u);
      log_s[i] = log1p(moments[i].s_minus_1);
      statistics[i] = unirl::finish(moments[i], of[i].readout.kappa, log_s[i]);
      set(out.statistics, rows[i], statistics[i]);
    }
    RowsProgram program(from.program, from.params);
    for (int at = LOGP; at < FIRST_FIELD + from.program.n_fields; ++at) {
      for (int64_t i = 0; i < n; ++i) program.input(at)[i] = input(at, rows[i]);
    }
    program.run(n);
    for (int64_t i = 0; i < n; ++i) {
      out.loss.set(rows[i], program.output(0)[i]);
      const Coefficients<double> d = {program.output(1)[i], program.output(2)[i], program.output(3)[i]};
      terms[i] = gradient_terms(statistics[i], d, of[i].readout, moments[i].top, log_s[i], of[i].target.x);
    }
  }
  // The program reads the returned, rounded statistics, so that logp passed as old_logp gives a ratio of exactly 1.
  double input(int at, int64_t row) const {
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
