// Parallel loops on the OpenMP threads that torch also uses; torch.set_num_threads sets their number.
#pragma once

#include <stdint.h>

#include <functional>

namespace unirl::cpu {

int thread_count();

// Calls body(begin, end) on at most ceil(n / grain) parts of [0, n), of about the same size. The assignment of parts to
// threads depends only on n, grain and the number of threads.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace unirl::cpu
