// The OpenMP threads that torch uses as well; torch.set_num_threads says how many.
#pragma once

#include <stdint.h>

#include <functional>

namespace unirl::cpu {

int thread_count();

// Calls body(begin, end) on parts of [0, n), none smaller than grain but the last. Which part meets which thread
// depends on nothing but n, grain and the number of threads.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace unirl::cpu
