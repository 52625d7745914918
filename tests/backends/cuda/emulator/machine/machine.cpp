#include "machine.h"

#include <string.h>

#include <algorithm>
#include <array>
#include <map>
#include <numeric>

#include "operations.h"
#include "vector_types.h"

dim3 threadIdx, blockIdx, gridDim;

namespace emulator {
namespace {

constexpr size_t GUARD = 256;              // bytes
constexpr size_t STATIC_BYTES = 16 << 10;  // room for static variables

size_t start_of_variables(size_t dynamic) { return (dynamic + 15) / 16 * 16 + GUARD; }

// Whether nothing was written there.
bool poisoned(const unsigned char* memory, size_t bytes) {
  return std::all_of(memory, memory + bytes, [](unsigned char byte) { return byte == POISON; });
}

}  // namespace

Machine machine;
int planted_fault = -1;

bool Site::operator==(const Site& other) const {
  return line == other.line && strcmp(operation, other.operation) == 0 && strcmp(file, other.file) == 0;
}

std::string Site::text() const { return std::string(operation) + " (" + file + ":" + std::to_string(line) + ")"; }

void Machine::schedule(Order order, uint64_t seed) {
  order_ = order;
  seed_ = seed;
}

std::string Machine::run(const Launch& launch) {
  if (launch.threads % WARP != 0 || launch.threads == 0 || launch.threads > MAX_THREADS) {
    return "blocks of " + std::to_string(launch.threads) + " threads are not whole warps up to 1024 threads";
  }
  if (launch.cluster == 0 || launch.cluster > MAX_CLUSTER || launch.grid % launch.cluster != 0) {
    return "a grid of " + std::to_string(launch.grid) + " blocks is not cut into clusters of " +
           std::to_string(launch.cluster);
  }
  launch_ = launch;
  variables_.clear();
  failure_.clear();
  random_.seed(seed_);
  std::vector<unsigned> clusters(launch.grid / launch.cluster);
  std::iota(clusters.begin(), clusters.end(), 0);
  if (order_ == Order::BACKWARD) std::reverse(clusters.begin(), clusters.end());
  if (order_ == Order::RANDOM) std::shuffle(clusters.begin(), clusters.end(), random_);
  for (unsigned cluster : clusters) {
    first_block_ = cluster * launch.cluster;
    run_cluster();
    if (!failure_.empty()) break;
  }
  launch_.kernel = nullptr;
  return failure_;
}

void Machine::run_cluster() {
  prepare();
  while (failure_.empty() && unfinished_ > 0) {
    const auto pass_all = [&] { return visit(blocks_.size(), [&](size_t rank) {
      return until_stuck([&] { return pass(blocks_[rank]); });
    }); };
    if (!until_stuck(pass_all)) note(deadlock());
  }
  for (Block& block : blocks_) check_ended(block);
  if (failure_.empty()) return;
  for (Thread& thread : threads_) {
    if (!thread.finished) thread.fiber->abandon();
  }
}

void Machine::prepare() {
  const size_t per_block = launch_.threads, all = per_block * launch_.cluster;
  while (fibers_.size() < all) fibers_.push_back(std::make_unique<Fiber>());
  cluster_ = {static_cast<int>(all)};
  blocks_.assign(launch_.cluster, {});
  threads_.clear();
  for (size_t rank = 0; rank < blocks_.size(); ++rank) {
    Block& block = blocks_[rank];
    block.rank = static_cast<int>(rank);
    block.barrier.expected = static_cast<int>(per_block);
    block.bytes = start_of_variables(launch_.shared) + STATIC_BYTES + GUARD;
    block.allocation.assign(block.bytes + 32, POISON);
    // Aligned to 16 bytes, as CUDA promises, and to no more.
    block.memory = block.allocation.data();
    while (reinterpret_cast<uintptr_t>(block.memory) % 32 != 16) ++block.memory;
    block.warps.resize(per_block / WARP);
    for (size_t i = 0; i < per_block; ++i) {
      Warp& warp = block.warps[i / WARP];
      if (i % WARP == 0) warp.first = threads_.size();
      warp.barrier.expected = WARP;
      threads_.emplace_back(block, warp, *fibers_[threads_.size()], static_cast<int>(i));
    }
  }
  unfinished_ = all;
}

// Calls visit(i) for all i < n in the order of the schedule. Returns whether any of them got somewhere.
template <class Visit>
bool Machine::visit(size_t n, const Visit& visit) {
  std::array<uint8_t, WARP> order;  // no group has more members
  std::iota(order.begin(), order.begin() + n, 0);
  if (order_ == Order::BACKWARD) std::reverse(order.begin(), order.begin() + n);
  if (order_ == Order::RANDOM) std::shuffle(order.begin(), order.begin() + n, random_);
  bool progress = false;
  for (size_t i = 0; i < n && failure_.empty(); ++i) progress |= visit(order[i]);
  return progress;
}

// Repeats a pass while it gets somewhere; in random order it may end sooner. Returns whether it got anywhere.
template <class Pass>
bool Machine::until_stuck(const Pass& pass) {
  bool progress = false;
  while (failure_.empty() && pass()) {
    progress = true;
    if (chance(2)) break;
  }
  return progress;
}

bool Machine::pass(Block& block) {
  return visit(block.warps.size(), [&](size_t i) { return until_stuck([&] { return pass(block.warps[i]); }); });
}

bool Machine::pass(Warp& warp) {
  return visit(WARP, [&](size_t lane) { return step(threads_[warp.first + lane]); });
}

// Runs a thread until it waits or ends. Returns whether it could.
bool Machine::step(Thread& thread) {
  if (thread.finished || (thread.waits_for != nullptr && thread.waits_for->phase == thread.phase)) return false;
  if (chance(4)) return true;  // held up
  if (!thread.block->started) start(*thread.block);
  for (size_t i = 0; i < thread.pending.size();) {
    if (chance(4)) {
      land(thread, i);
    } else {
      ++i;
    }
  }
  thread.waits_for = nullptr;
  running_ = &thread;
  threadIdx = {static_cast<unsigned>(thread.index), 0, 0};
  blockIdx = {first_block_ + thread.block->rank, 0, 0};
  gridDim = {launch_.grid};
  thread.fiber->resume(body);
  running_ = nullptr;
  if (thread.finished) finish(thread);
  return true;
}

void Machine::body() {
  machine.launch_.kernel();
  machine.running_->finished = true;
}

void Machine::finish(Thread& thread) {
  --unfinished_;
  release(thread);
  Block& block = *thread.block;
  Warp& warp = *thread.warp;
  if (thread.fiber->overflowed()) note("a fiber's stack is too small for the kernel");
  if (!thread.pending.empty()) note("a thread ended while its copies were under way");
  if (thread.arrived) note("a thread ended between the two halves of a cluster barrier");
  if (++warp.finished == WARP) {
    for (int lane = 0; lane < WARP; ++lane) {
      if (threads_[warp.first + lane].aligned != warp.aligned.size()) note("lanes of a warp went different ways");
    }
  }
  if (++block.finished == block.barrier.expected) end(block);
}

void Machine::start(Block& block) {
  block.started = true;
  if (!poisoned(block.memory, block.bytes)) note("shared memory was written before its block started");
}

// Memory of a block that has ended may not be used: it holds NaN again.
void Machine::end(Block& block) {
  const size_t variables = start_of_variables(launch_.shared);
  const size_t used = variables_.empty() ? 0 : variables_.back().offset + variables_.back().bytes - variables;
  const bool intact = poisoned(block.memory + launch_.shared, variables - launch_.shared) &&
                      poisoned(block.memory + variables + used, STATIC_BYTES + GUARD - used);
  if (!intact) note("shared memory was written beyond its end");
  memset(block.memory, POISON, block.bytes);
}

void Machine::check_ended(const Block& block) {
  if (failure_.empty() && !poisoned(block.memory, block.bytes)) note("shared memory was written after its block ended");
}

const Variable& Machine::variable(const char* file, int line, size_t bytes) {
  for (const Variable& v : variables_) {
    if (v.line == line && v.bytes == bytes && strcmp(v.file, file) == 0) return v;
  }
  const size_t start = start_of_variables(launch_.shared);
  const size_t end = variables_.empty() ? start : variables_.back().offset + variables_.back().bytes;
  const size_t offset = (end + 15) / 16 * 16, used = offset + bytes - start;
  if (used > STATIC_BYTES || used + launch_.shared > MAX_SHARED) {
    fail("a block has " + std::to_string(launch_.shared) + " bytes of dynamic and " + std::to_string(used) +
         " of static shared memory");
  }
  variables_.push_back({file, line, offset, bytes});
  return variables_.back();
}

Variable Machine::variable_at(size_t offset) {
  if (offset < launch_.shared) return {"", 0, 0, launch_.shared};
  for (const Variable& v : variables_) {
    if (offset >= v.offset && offset < v.offset + v.bytes) return v;
  }
  fail("an address that is not in the block's shared memory");
}

void Machine::wait(const Barrier& barrier, uint64_t phase, const Site& site) {
  if (barrier.phase != phase) return;
  Thread& thread = running();
  thread.waits_for = &barrier;
  thread.phase = phase;
  thread.site = site;
  Fiber::pause();
}

void Machine::note(const std::string& reason) {
  if (failure_.empty()) failure_ = reason;
}

void Machine::fail(const std::string& reason) {
  note(reason + " (thread " + std::to_string(running().index) + " of block " +
       std::to_string(block_index(*running().block)) + ")");
  for (;;) Fiber::pause();
}

std::string Machine::deadlock() const {
  std::map<std::string, int> waiting;
  for (const Thread& thread : threads_) ++waiting[thread.finished ? "their end" : thread.site.text()];
  std::string text = "deadlock: threads wait for others that do not come;";
  for (const auto& [where, n] : waiting) text += " " + std::to_string(n) + " at " + where + ",";
  text.pop_back();
  return text;
}

}  // namespace emulator
