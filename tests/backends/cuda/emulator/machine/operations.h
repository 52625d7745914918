// What a running thread does beyond arithmetic and plain memory accesses. Each stops the launch where the kernel does
// what CUDA leaves undefined.
#pragma once

#include "machine.h"

namespace emulator {

// Of the whole block, and of a whole warp. All threads have to come to the same place in the source.
void sync_threads(const Site& site);
void sync_warp(const Site& site);

// Shows the warp a value; returns what another lane shows.
uint64_t exchange(uint64_t value, int lane, const Site& site);

// The two halves of a cluster barrier. Lanes of a warp have to come to the same ones, but do not wait for one another
// there: the hardware does not promise it.
void cluster_arrive(const Site& site);
void cluster_wait(const Site& site);

// The same shared memory in another block of the cluster.
unsigned char* in_block(const void* own, int rank);

// Lets others see what the thread has written to other blocks; lets it see what others have released.
void release(Thread& thread);
void acquire(Thread& thread);

// Asynchronous copies into shared memory. What is copied is read when the copy lands.
void start_copy(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(size_t pending);
void land(Thread& thread, size_t copy);

unsigned char* dynamic_memory();
unsigned char* static_variable(const char* file, int line, size_t bytes);

void check_alignment(const void* address, size_t bytes, const char* what);

}  // namespace emulator
