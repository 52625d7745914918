#include "parallel.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <exception>

namespace unirl::cpu {

#ifdef _OPENMP

int thread_count() { return omp_get_max_threads(); }

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  if (n <= std::max<int64_t>(grain, 1) || thread_count() == 1 || omp_in_parallel()) return body(0, n);
  std::exception_ptr failure;
#pragma omp parallel
  {
    const int64_t most = (n + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), most), share = (n + threads - 1) / threads;
    const int64_t begin = omp_get_thread_num() * share;
    if (begin < n) {
      try {
        body(begin, std::min(n, begin + share));
      } catch (...) {
#pragma omp critical(unirl_failure)
        failure = std::current_exception();
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
}

#else

int thread_count() { return 1; }

void parallel_for(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  if (n > 0) body(0, n);
}

#endif

}  // namespace unirl::cpu
