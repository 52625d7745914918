// How a row is cut: into slices for the blocks of a cluster, and vectors of 16 bytes for their threads. The cut, and so
// the bits of a row, depend only on V and the format.
#pragma once

#include <stdint.h>

namespace unirl::cuda {

constexpr int THREADS = 256;
constexpr int VECTOR_BYTES = 16;
constexpr int MAX_CLUSTER = 16;       // blocks; needs the kernel attribute for sizes that are not portable
constexpr int PORTABLE_CLUSTER = 8;
constexpr int COPY_GROUPS = 4;        // groups of a slice's copies; while one is summed, the next ones arrive

// Blocks that fit on a multiprocessor by their registers: 48 per thread, or 64 for the longer code of a softcap.
constexpr int BLOCKS_PER_SM = 5;
constexpr int CAPPED_BLOCKS_PER_SM = 4;

// Shared memory of a multiprocessor, and what a block needs besides its slice: for the system, and for the exchange
// between blocks and the slice's alignment (cluster_rows.h asserts it).
constexpr int64_t SM_MEMORY = 228 << 10;
constexpr int64_t SYSTEM_MEMORY = 1 << 10;
constexpr int64_t OTHER_MEMORY = 800;

// Five blocks with good slices, or three with fair ones, fit on a multiprocessor: enough that some load and store while
// others wait for their peers. (Computed; sizes between them are to be measured on a device.)
constexpr int64_t GOOD_SLICE = 40 << 10;
constexpr int64_t FAIR_SLICE = SM_MEMORY / 3 - SYSTEM_MEMORY - OTHER_MEMORY;
// A block may have 227 KiB; the rest is for the exchange between blocks.
constexpr int64_t MAX_SLICE = 224 << 10;

struct Geometry {
  int cluster;  // blocks of a row
  int width;    // logits of a slice, a multiple of a vector; the last slice may be shorter
};

// Logits per slice if a row of vocab logits is cut for a cluster.
inline int64_t slice_width(int64_t vocab, int cluster, int64_t logit_bytes) {
  const int64_t vector = VECTOR_BYTES / logit_bytes;
  const int64_t vectors = (vocab + vector - 1) / vector;
  return (vectors + cluster - 1) / cluster * vector;
}

// The smallest portable cluster with good slices; else the largest portable one, if its slices are fair; else
// MAX_CLUSTER. cluster 0: the row does not fit.
inline Geometry geometry(int64_t vocab, int64_t logit_bytes) {
  const auto bytes = [&](int cluster) { return slice_width(vocab, cluster, logit_bytes) * logit_bytes; };
  int cluster = 1;
  while (cluster < PORTABLE_CLUSTER && bytes(cluster) > GOOD_SLICE) cluster *= 2;
  if (bytes(cluster) > FAIR_SLICE) cluster = MAX_CLUSTER;
  if (bytes(cluster) > MAX_SLICE) return {0, 0};
  return {cluster, static_cast<int>(slice_width(vocab, cluster, logit_bytes))};
}

// The largest number of logits in a row.
inline int64_t max_vocab(int64_t logit_bytes) { return MAX_CLUSTER * (MAX_SLICE / logit_bytes); }

}  // namespace unirl::cuda
