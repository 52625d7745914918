// The row kernels of csrc/cpu without torch: reads a case from standard input, writes what fused_loss and
// token_observations make of it to standard output. For machines that tests reach through an emulator alone.
//
// Input: int64 format, rows, vocab, n_params, bytes of the program's text; double scale, softcap (0: none),
// temperature; the text; fields [n_fields, rows] and logits [rows, vocab] of the format's row dtype and dtype;
// int64 target [rows]; double params.
// Output: loss, logp, entropy, lse, log_sum_sq_probs, mean_logit, largest [rows] each; int64 argmax [rows]; d_logits.
#include <stdio.h>
#include <stdlib.h>

#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "program_code.h"

namespace unirl::cpu {

int thread_count() { return 1; }

void parallel_for(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) { body(0, n); }

}  // namespace unirl::cpu

using namespace unirl;

template <class T>
std::vector<T> read(int64_t n) {
  std::vector<T> values(n);
  if (fread(values.data(), sizeof(T), n, stdin) != static_cast<size_t>(n)) {
    fprintf(stderr, "the case ends too early\n");
    exit(1);
  }
  return values;
}

void write(const std::vector<char>& bytes) { fwrite(bytes.data(), 1, bytes.size(), stdout); }

int main() {
  const std::vector<int64_t> sizes = read<int64_t>(5);
  const int64_t rows = sizes[1], vocab = sizes[2];
  const cpu::Format format = static_cast<cpu::Format>(sizes[0]);
  const bool fp64 = format == cpu::Format::FP64;
  const int64_t row_bytes = fp64 ? 8 : 4, logit_bytes = fp64 ? 8 : format == cpu::Format::FP32 ? 4 : 2;
  const std::vector<double> readout = read<double>(3);
  const std::vector<char> text = read<char>(sizes[4]);
  const std::shared_ptr<const Program> program = decode_program(std::string(text.begin(), text.end()));
  std::vector<char> fields = read<char>(program->n_fields * rows * row_bytes);
  std::vector<char> logits = read<char>(rows * vocab * logit_bytes);
  const std::vector<int64_t> target = read<int64_t>(rows);
  const std::vector<double> params = read<double>(sizes[3]);

  std::vector<std::vector<char>> out(7, std::vector<char>(rows * row_bytes));
  std::vector<int64_t> argmax(rows);
  std::vector<char> d_logits(logits.size());
  const auto column = [&](std::vector<char>& of) { return cpu::Column{of.data(), fp64}; };
  const cpu::Rows of = {.format = format,
                        .batch = 1,
                        .length = rows,
                        .vocab = vocab,
                        .logits = {logits.data(), rows * vocab, vocab},
                        .target = target.data(),
                        .ignore = -100,
                        .scale = readout[0],
                        .softcap = readout[1],
                        .temperature = readout[2],
                        .row_temperature = {}};
  const cpu::StatisticsColumns statistics = {column(out[1]), column(out[2]), column(out[3])};
  cpu::fused_loss(of, {*program, column(fields), params.data()}, {d_logits.data(), rows * vocab, vocab},
                  {column(out[0]), statistics});
  cpu::token_observations(of, {}, {column(out[4]), column(out[5]), column(out[6]), argmax.data()});
  for (const std::vector<char>& values : out) write(values);
  fwrite(argmax.data(), sizeof(int64_t), rows, stdout);
  write(d_logits);
}
