// The cluster kernel's first sweep on the CPU: the same slices, lanes, warps and ranks, the same arithmetic in the same
// order. Reads fp32 logits, prints logp, entropy, lse, and the cluster that the launcher would choose.
//
//     cluster_model FILE VOCAB LOGIT_BYTES CLUSTER SOFTCAP TEMPERATURE TARGET
#include <stdio.h>
#include <stdlib.h>

#include <array>
#include <vector>

#include "../../../csrc/cuda/geometry.h"
#include "../../../csrc/cuda/partial_sums.h"

using namespace unirl;
using namespace unirl::cuda;

template <size_t WIDTH>
Moments<double> combine(const std::array<Moments<double>, WIDTH>& parts, const Exponent& exponent) {
  float m = -INFINITY;
  for (const auto& part : parts) m = max_or_nan(m, static_cast<float>(part.m));
  std::array<Moments<double>, WIDTH> lanes;
  for (size_t i = 0; i < WIDTH; ++i) lanes[i] = relative_to(m, parts[i], exponent);
  for (size_t step = WIDTH / 2; step > 0; step /= 2) {
    const auto before = lanes;
    for (size_t i = 0; i < WIDTH; ++i) {
      lanes[i].s += before[i ^ step].s;
      lanes[i].sz += before[i ^ step].sz;
    }
  }
  for (const auto& lane : lanes) {
    if (lane.s != lanes[0].s || lane.sz != lanes[0].sz) abort();  // lanes of a warp would disagree
  }
  return lanes[0];
}

template <int N>
Moments<float> of_thread(const float* u, int64_t n, int thread, const Exponent& exponent) {
  Moments<float> at = no_moments();
  int64_t i = thread;
  for (; i < n / N; i += THREADS) {
    float vector[N];
    for (int k = 0; k < N; ++k) vector[k] = u[i * N + k];
    accumulate(at, vector, exponent);
  }
  if (i == n / N) {
    for (int64_t k = i * N; k < n; ++k) accumulate(at, {u[k]}, exponent);
  }
  return at;
}

Moments<double> of_slice(const float* u, int64_t n, int64_t vector, const Exponent& exponent) {
  constexpr int LANES = 32;
  std::array<Moments<double>, THREADS / LANES> warps;
  for (size_t warp = 0; warp < warps.size(); ++warp) {
    std::array<Moments<double>, LANES> lanes;
    for (int lane = 0; lane < LANES; ++lane) {
      const int thread = static_cast<int>(warp) * LANES + lane;
      lanes[lane] = widen(vector == 4 ? of_thread<4>(u, n, thread, exponent) : of_thread<8>(u, n, thread, exponent));
    }
    warps[warp] = combine(lanes, exponent);
  }
  return combine(warps, exponent);
}

int main(int, char** argv) {
  const int64_t vocab = atoll(argv[2]), bytes = atoll(argv[3]);
  const int cluster = atoi(argv[4]);
  const Readout<double> readout = make_readout(1.0, atof(argv[5]), atof(argv[6]));
  const int64_t target = atoll(argv[7]);
  std::vector<float> u(vocab);
  FILE* const file = fopen(argv[1], "rb");
  if (file == nullptr || fread(u.data(), sizeof(float), vocab, file) != static_cast<size_t>(vocab)) return 1;
  const Readout<float> narrow = {static_cast<float>(readout.gain), static_cast<float>(readout.kappa), readout.capped};
  for (float& x : u) x = to_u(narrow, x);
  const Exponent exponent = make_exponent(readout.kappa);
  const int64_t width = slice_width(vocab, cluster, bytes);
  std::array<Moments<double>, MAX_CLUSTER> parts;
  for (int64_t rank = 0; rank < MAX_CLUSTER; ++rank) {
    const int64_t begin = rank * width, n = begin + width < vocab ? width : vocab - begin;
    parts[rank] = widen(no_moments());
    if (rank < cluster && n > 0) parts[rank] = of_slice(u.data() + begin, n, VECTOR_BYTES / bytes, exponent);
  }
  const RowMoments<double> row = row_moments(combine(parts, exponent), readout, static_cast<double>(u[target]));
  const Statistics<double> at = finish(row, readout.kappa, log1p(row.s_minus_1));
  const Geometry chosen = geometry(vocab, bytes);
  printf("%.17g %.17g %.17g %d\n", at.logp, at.entropy, at.lse, chosen.cluster);
}
