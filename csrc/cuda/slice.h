// A block's slice of a row in shared memory: asynchronous copies into it, and reads of vectors at any offset.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "formats.h"

namespace unirl::cuda {

// The address modulo 16.
inline __device__ int misalignment(const void* address) { return reinterpret_cast<uintptr_t>(address) & 15; }

// Waits until at most `pending` of this thread's copy groups are unfinished. The instruction takes only a constant.
inline __device__ void wait_for_copies(int pending) {
  static_assert(COPY_GROUPS == 4, "a case for each group");
  if (pending == 3) {
    __pipeline_wait_prior(3);
  } else if (pending == 2) {
    __pipeline_wait_prior(2);
  } else if (pending == 1) {
    __pipeline_wait_prior(1);
  } else {
    __pipeline_wait_prior(0);
  }
}

// Logit k is at byte shift + k * sizeof(Storage) of the memory, so that chunks of 16 bytes are aligned at both source
// and destination.
template <class Format>
struct Slice {
  typedef typename Format::Storage Storage;
  static constexpr int SIZE = sizeof(Storage);
  static constexpr int N = Format::N;
  static constexpr int SLACK = 32;  // bytes besides the logits: shift, and the rest of the last vector's second chunk

  unsigned char* memory;
  int n;
  int shift;

  __device__ Slice(unsigned char* memory, const Storage* x, int n) : memory(memory), n(n), shift(misalignment(x)) {}

  __device__ int chunks() const { return (shift + n * SIZE + VECTOR_BYTES - 1) / VECTOR_BYTES; }

  __device__ int chunks_per_group() const {
    return (chunks() + COPY_GROUPS * THREADS - 1) / (COPY_GROUPS * THREADS) * THREADS;
  }

  // Starts all copies. If a chunk reaches beyond the slice, only the logits of the slice are copied, one by one.
  __device__ void copy(const Storage* x) const {
    const auto* from = reinterpret_cast<const unsigned char*>(x) - shift;
    const int per_group = chunks_per_group();
    const int first = shift != 0, end = (shift + n * SIZE) / VECTOR_BYTES;
    for (int group = 0; group < COPY_GROUPS; ++group) {
      for (int i = group * per_group + threadIdx.x; i < min((group + 1) * per_group, end); i += THREADS) {
        const int at = i * VECTOR_BYTES;
        if (i >= first) __pipeline_memcpy_async(memory + at, from + at, VECTOR_BYTES);
      }
      __pipeline_commit();
    }
    auto* logits = reinterpret_cast<Storage*>(memory + shift);
    const int head = first ? min(n, (VECTOR_BYTES - shift) / SIZE) : 0;
    const int tail = max(head, (end * VECTOR_BYTES - shift) / SIZE);
    const int k = threadIdx.x;
    if (k < head) logits[k] = x[k];
    if (k < n - tail) logits[tail + k] = x[tail + k];
  }

  // Vectors of the slice that are complete after this group and the earlier ones. An unaligned vector spans two chunks.
  __device__ int vectors_after(int group) const {
    return group == COPY_GROUPS - 1 ? n / N : min(n / N, (group + 1) * chunks_per_group() - (shift != 0));
  }

  __device__ float operator[](int k) const {
    return Format::widen(reinterpret_cast<const Storage*>(memory + shift)[k]);
  }

  // The raw N logits from k on. ALIGNED must be the same for all threads.
  template <bool ALIGNED>
  __device__ uint4 vector(int k) const {
    const int at = shift + k * SIZE, offset = ALIGNED ? 0 : at % VECTOR_BYTES;
    const auto* chunk = reinterpret_cast<const uint4*>(memory + at - offset);
    return ALIGNED || offset == 0 ? chunk[0] : shifted(chunk[0], chunk[1], offset);
  }

  // Whether all vectors from logit k on are aligned.
  __device__ bool aligned(int k) const { return (shift + k * SIZE) % VECTOR_BYTES == 0; }

 private:
  static __device__ uint4 shifted(const uint4& low, const uint4& high, int offset) {
    uint32_t parts[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (offset & 8) {
      for (int i = 0; i < 6; ++i) parts[i] = parts[i + 2];
    }
    if (offset & 4) {
      for (int i = 0; i < 5; ++i) parts[i] = parts[i + 1];
    }
    const int bits = (offset & 3) * 8;
    return {__funnelshift_r(parts[0], parts[1], bits), __funnelshift_r(parts[1], parts[2], bits),
            __funnelshift_r(parts[2], parts[3], bits), __funnelshift_r(parts[3], parts[4], bits)};
  }
};

// Number of logits before the first aligned address in d_x.
template <class Format>
__device__ int head_of(const typename Format::Storage* d_x, int n) {
  const int shift = misalignment(d_x);
  return shift != 0 ? min(n, (VECTOR_BYTES - shift) / static_cast<int>(sizeof *d_x)) : 0;
}

// Writes n values to d_x: vectors of N at aligned addresses, single values before and after them.
// values(k, of) fills the array of, which has N or 1 elements, with the values from k on.
template <class Format, class Values>
__device__ void store(typename Format::Storage* d_x, int n, const Values& values) {
  constexpr int N = Format::N;
  const int head = head_of<Format>(d_x, n), end = head + (n - head) / N * N;
#pragma unroll 2
  for (int k = head + threadIdx.x * N; k < end; k += THREADS * N) {
    float of[N];
    values(k, of);
    // Streaming store: nothing reads the gradient soon, and later rows need the cache.
    __stcs(reinterpret_cast<uint4*>(d_x + k), Format::pack(of));
  }
  const int i = threadIdx.x, edge = i < head ? i : end + i - head;
  if (edge < n) {
    float of[1];
    values(edge, of);
    d_x[edge] = Format::narrow(of[0]);
  }
}

}  // namespace unirl::cuda
