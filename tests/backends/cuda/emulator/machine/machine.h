// What CUDA threads run on here: each is a fiber, and one of them runs at a time, until it waits for others.
//
// A launch goes cluster by cluster. Shared memory holds NaN until it is written. The schedule says in which order
// blocks, warps and lanes go on, and when copies land.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulator {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;  // of a block
constexpr int MAX_CLUSTER = 16;    // blocks
constexpr size_t MAX_SHARED = 227 << 10;       // bytes of a block, dynamic and static
constexpr size_t DEFAULT_SHARED = 48 << 10;    // bytes of dynamic memory that need no attribute
constexpr unsigned char POISON = 0xff;         // all ones are NaN in every format

// A place in the kernel's source, and what stands there.
struct Site {
  const char* operation;
  const char* file;
  int line;

  bool operator==(const Site& other) const;
  std::string text() const;
};

// Where all threads of a group wait for one another.
struct Barrier {
  int expected = 0;
  int arrived = 0;
  uint64_t phase = 0;  // how often all have come
  Site site = {};      // where those stand that have come
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  size_t bytes;
  size_t group;
};

// A thread's view of a variable in another block's memory. What it writes there is its own until it releases it.
struct View {
  int rank;
  size_t offset;                           // in the memory of a block
  std::vector<unsigned char> now, before;  // before: when it last was the same for all
};

struct Block;
struct Warp;

struct Thread {
  Thread(Block& block, Warp& warp, Fiber& fiber, int index)
      : block(&block), warp(&warp), fiber(&fiber), index(index), lane(index % WARP) {}

  Block* block;
  Warp* warp;
  Fiber* fiber;
  int index, lane;
  bool finished = false;
  // It goes on once the barrier has left this phase.
  const Barrier* waits_for = nullptr;
  uint64_t phase = 0;
  Site site = {};
  // Of the cluster's barrier, at which arriving and waiting are two operations.
  bool arrived = false;
  uint64_t arrived_in = 0;
  size_t aligned = 0;         // instructions so far that all lanes of a warp execute together
  std::vector<Copy> pending;  // asynchronous copies that have not landed
  size_t groups = 0;          // of copies, committed so far
  std::vector<View> views;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][WARP];    // what lanes show one another, for phases that are even and odd
  std::vector<Site> aligned;  // where its aligned instructions stand, in the order of the first lane to come
  size_t first;               // thread of the cluster
  int finished = 0;
};

// Memory: dynamic bytes, a guard, static variables, a guard.
struct Block {
  int rank;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> allocation;
  unsigned char* memory;
  size_t bytes;
  bool started = false;
  int finished = 0;
};

// A variable in static shared memory: at the same offset in every block.
struct Variable {
  const char* file;
  int line;
  size_t offset, bytes;
};

struct Launch {
  unsigned grid = 1, threads = 1;  // blocks, and threads of each
  unsigned cluster = 1;            // blocks
  size_t shared = 0;               // bytes of dynamic memory
  std::function<void()> kernel;
};

enum class Order { FORWARD, BACKWARD, RANDOM };

class Machine {
 public:
  // FORWARD and BACKWARD let a lane, a warp, a block go as far as it can before the next one moves; copies land when
  // they are waited for. RANDOM mixes them, holds threads up, and lands copies at any time.
  void schedule(Order order, uint64_t seed);

  // Runs all blocks. Returns what went wrong, empty if nothing did.
  std::string run(const Launch& launch);

  // Ends the launch. Called by a thread, which does not go on.
  [[noreturn]] void fail(const std::string& reason);

  void wait(const Barrier& barrier, uint64_t phase, const Site& site);
  bool chance(unsigned one_in) { return order_ == Order::RANDOM && random_() % one_in == 0; }

  const Launch& launch() const { return launch_; }
  Thread& running() { return *running_; }
  Block& block(int rank) { return blocks_[rank]; }
  Barrier& cluster() { return cluster_; }
  unsigned block_index(const Block& block) const { return first_block_ + block.rank; }
  const Variable& variable(const char* file, int line, size_t bytes);
  // The one at an offset of a block's memory; the dynamic memory is one, too.
  Variable variable_at(size_t offset);

 private:
  void run_cluster();
  void prepare();
  void start(Block& block);
  void end(Block& block);
  void check_ended(const Block& block);
  bool pass(Block& block);
  bool pass(Warp& warp);
  bool step(Thread& thread);
  void finish(Thread& thread);
  static void body();
  std::string deadlock() const;
  void note(const std::string& reason);
  template <class Visit>
  bool visit(size_t n, const Visit& visit);
  template <class Pass>
  bool until_stuck(const Pass& pass);

  Order order_ = Order::FORWARD;
  uint64_t seed_ = 0;
  std::mt19937_64 random_;
  Launch launch_;
  unsigned first_block_ = 0;
  Barrier cluster_;
  std::vector<Block> blocks_;
  std::vector<Thread> threads_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Variable> variables_;
  Thread* running_ = nullptr;
  size_t unfinished_ = 0;
  std::string failure_;
};

extern Machine machine;

// How many blocks a part of the device runs at once, for what asks before it launches.
extern unsigned blocks_at_once;

// Which of the faults that were compiled into the kernels is there; -1: none. See faults.py.
extern int planted_fault;

}  // namespace emulator
