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

// The target's logit, raw and mapped (see row_math.h).
struct Target {
  double x, u;
};

// One call's way over its rows. A Step is what stands between the two sweeps of a row:
//   typedef ... Sums               of the first sweep: Moments<double>, or Observed<double>
//   static constexpr bool READS    whether it wants them
//   static constexpr bool WRITES   whether its terms are for the second sweep
//   GradientTerms<double> operator()(int64_t row, readout, sums, target) const
//   void skip(int64_t row) const   what an ignored row returns
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
    std::vector<int64_t> valid, ignored;
    for (int64_t row = 0; row < rows_.batch * rows_.length; ++row) {
      (rows_.target[row] == rows_.ignore ? ignored : valid).push_back(row);
    }
    const int64_t n = valid.size(), threads = thread_count();
    const int64_t rows_per_thread = std::max<int64_t>(1, LOGITS_PER_THREAD / rows_.vocab);
    const auto here = [](int64_t n, const auto& body) { body(0, n); };
    const auto on_all_threads = [](int64_t n, const auto& body) { parallel_for(n, 1, body); };
    if (n >= ROWS_PER_THREAD * threads || n * rows_.vocab < 2 * LOGITS_PER_THREAD) {
      parallel_for(n, rows_per_thread, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) together(&valid[i], 1, here);
      });
    } else {
      // Few rows: their segments are spread over the threads, about a row for each, so that the second sweep still
      // finds in the cache what the first one read.
      for (int64_t i = 0; i < n; i += threads) together(&valid[i], std::min(threads, n - i), on_all_threads);
    }
    parallel_for(ignored.size(), rows_per_thread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) skip(ignored[i]);
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
        if (in_range(rows[i])) kernels_.write(at(d_logits_, rows[i], rows_.target[rows[i]]), terms[i].target);
      }
    }
  }

  void skip(int64_t row) const {
    step_.skip(row);
    if (Step::WRITES) memset(at(d_logits_, row, 0), 0, rows_.vocab * kernels_.bytes);
  }

  GradientTerms<double> finish(int64_t row, const Sums* segments) const {
    const bool valid = in_range(row);
    const Readout<double> readout = readout_of(row);
    Sums sums = without_distribution();
    if (valid && Step::READS) {
      sums = segments[0];
      for (int64_t i = 1; i < segments_; ++i) sums = merge(sums, segments[i], readout.kappa);
      if constexpr (OBSERVES) {
        const void* const x = at(rows_.logits, row, sums.at);
        sums.at += kernels_.find(x, size_of(sums.at / SEGMENT), sums.top, readout);
      }
    }
    Target target{NAN, NAN};
    if (valid) {
      const void* const x = at(rows_.logits, row, rows_.target[row]);
      target = {kernels_.read(x), kernels_.u(x, readout)};
    }
    return step_(row, readout, sums, target);
  }

  static Sums without_distribution() {
    if constexpr (OBSERVES) {
      return {{NAN, NAN, NAN}, NAN, NAN, NAN, 0};
    } else {
      return {NAN, NAN, NAN};
    }
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

  bool in_range(int64_t row) const { return rows_.target[row] >= 0 && rows_.target[row] < rows_.vocab; }

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

struct Measure {
  typedef Moments<double> Sums;
  static constexpr bool READS = true, WRITES = false;
  const StatisticsColumns& out;

  GradientTerms<double> operator()(
      int64_t row, const Readout<double>& readout, const Moments<double>& moments, const Target& target) const {
    set(out, row, unirl::finish(moments, readout, target.u));
    return {};
  }
  void skip(int64_t row) const { set(out, row, {}); }
};

struct Observe {
  typedef Observed<double> Sums;
  static constexpr bool READS = true, WRITES = false;
  const ObservationColumns& out;
  int64_t vocab;

  GradientTerms<double> operator()(
      int64_t row, const Readout<double>& readout, const Observed<double>& sums, const Target& target) const {
    set_all(row, unirl::finish(sums, readout, target.u, vocab));
    return {};
  }
  void skip(int64_t row) const { set_all(row, {{}, 0, 0, 0, -1}); }
  void set_all(int64_t row, const Observations<double>& found) const {
    set(out.statistics, row, found.statistics);
    out.log_sum_sq_probs.set(row, found.log_sum_sq_probs);
    out.mean_logit.set(row, found.mean_logit);
    out.largest.set(row, found.largest);
    out.argmax[row] = found.argmax;
  }
};

struct Backward {
  typedef Moments<double> Sums;
  static constexpr bool READS = false, WRITES = true;
  const StatisticsColumns& at;
  const StatisticsColumns& d;

  GradientTerms<double> operator()(
      int64_t row, const Readout<double>& readout, const Moments<double>&, const Target& target) const {
    const Statistics<double> statistics = {at.logp.get(row), at.entropy.get(row), at.lse.get(row)};
    const Anchor anchor = anchor_of(statistics, readout, target.u, at.lse.fp64);
    return gradient_terms(
        statistics, {d.logp.get(row), d.entropy.get(row), d.lse.get(row)}, readout, anchor.reference, anchor.log_p,
        target.x);
  }
  void skip(int64_t) const {}
};

struct Fuse {
  typedef Moments<double> Sums;
  static constexpr bool READS = true, WRITES = true;
  const FieldColumns& fields;
  const Program& program;
  const double* params;
  const FusedColumns& out;

  GradientTerms<double> operator()(
      int64_t row, const Readout<double>& readout, const Moments<double>& moments, const Target& target) const {
    const Statistics<double> statistics = unirl::finish(moments, readout, target.u);
    out.logp.set(row, statistics.logp);
    out.entropy.set(row, statistics.entropy);
    // The program sees the statistics as they are returned, rounded: given back as old_logp they make a ratio of
    // exactly 1.
    const double logp = out.logp.get(row);
    const double inputs[N_INPUTS] = {
        logp,
        out.entropy.get(row),
        out.logp.fp64 ? statistics.lse : static_cast<float>(statistics.lse),
        fields.old_logp.data == nullptr ? logp : fields.old_logp.get(row),
        fields.ref_logp.get(row),
        fields.advantage.get(row),
    };
    double outputs[N_OUTPUTS];
    run_program(program, inputs, params, outputs);
    const double weight = fields.weight.get(row);
    out.loss.set(row, weight * outputs[0]);
    const Anchor anchor = anchor_of(moments);
    return gradient_terms(
        statistics, {weight * outputs[1], weight * outputs[2], weight * outputs[3]}, readout, anchor.reference,
        anchor.log_p, target.x);
  }
  void skip(int64_t row) const {
    out.loss.set(row, 0);
    out.logp.set(row, 0);
    out.entropy.set(row, 0);
  }
};

}  // namespace

void token_stats(const Rows& rows, const StatisticsColumns& out) { Pass(rows, {}, Measure{out}).run(); }

void token_observations(const Rows& rows, const ObservationColumns& out) {
  Pass(rows, {}, Observe{out, rows.vocab}).run();
}

void token_stats_backward(
    const Rows& rows, const StatisticsColumns& at, const StatisticsColumns& d, const Matrix& d_logits) {
  Pass(rows, d_logits, Backward{at, d}).run();
}

void fused_loss(
    const Rows& rows,
    const FieldColumns& fields,
    const Program& program,
    const double* params,
    const Matrix& d_logits,
    const FusedColumns& out) {
  Pass(rows, d_logits, Fuse{fields, program, params, out}).run();
}

}  // namespace unirl::cpu
