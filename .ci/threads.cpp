// csrc/cpu/parallel.cpp for ThreadSanitizer: threads of the C++ library, which it can follow. Several on any machine,
// so that there is something to follow.
#include <thread>
#include <vector>

#include "parallel.h"

namespace unirl::cpu {

int thread_count() { return 3; }

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t share = (n + thread_count() - 1) / thread_count(), part = share > grain ? share : grain;
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < n; begin += part) {
    threads.emplace_back(body, begin, begin + part < n ? begin + part : n);
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace unirl::cpu
