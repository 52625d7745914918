#include "operations.h"

#include <string.h>

namespace emulator {
namespace {

void meet(Barrier& barrier, const Site& site) {
  if (barrier.arrived > 0 && !(barrier.site == site)) {
    machine.fail("diverged: threads of a group wait at " + barrier.site.text() + " and at " + site.text());
  }
  barrier.site = site;
  const uint64_t phase = barrier.phase;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
  machine.wait(barrier, phase, site);
}

// An instruction that all lanes of a warp have to execute together.
void align(const Site& site) {
  Thread& thread = machine.running();
  std::vector<Site>& sites = thread.warp->aligned;
  if (thread.aligned == sites.size()) sites.push_back(site);
  if (!(sites[thread.aligned] == site)) {
    machine.fail("diverged: lanes of a warp come to " + sites[thread.aligned].text() + " and to " + site.text());
  }
  ++thread.aligned;
}

bool inside(const Block& block, const void* address, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(address);
  return at >= block.memory && at + bytes <= block.memory + block.bytes;
}

}  // namespace

void sync_threads(const Site& site) { meet(machine.running().block->barrier, site); }

void sync_warp(const Site& site) { meet(machine.running().warp->barrier, site); }

uint64_t exchange(uint64_t value, int lane, const Site& site) {
  Thread& thread = machine.running();
  Warp& warp = *thread.warp;
  if (lane < 0 || lane >= WARP) machine.fail("no lane " + std::to_string(lane) + " in " + site.text());
  // Fast lanes may write their next value while slow ones read; they cannot be two phases ahead.
  uint64_t(&slots)[WARP] = warp.slots[warp.barrier.phase % 2];
  slots[thread.lane] = value;
  meet(warp.barrier, site);
  return slots[lane];
}

void cluster_arrive(const Site& site) {
  align(site);
  Thread& thread = machine.running();
  if (thread.arrived) machine.fail("arrives twice without a wait at " + site.text());
  Barrier& barrier = machine.cluster();
  thread.arrived = true;
  thread.arrived_in = barrier.phase;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
}

void cluster_wait(const Site& site) {
  align(site);
  Thread& thread = machine.running();
  if (!thread.arrived) machine.fail("waits without having arrived at " + site.text());
  machine.wait(machine.cluster(), thread.arrived_in, site);
  thread.arrived = false;
}

void start_copy(void* to, const void* from, size_t bytes) {
  Thread& thread = machine.running();
  if (bytes != 4 && bytes != 8 && bytes != 16) machine.fail("copies of " + std::to_string(bytes) + " bytes");
  check_alignment(to, bytes, "an asynchronous copy");
  check_alignment(from, bytes, "an asynchronous copy");
  if (!inside(*thread.block, to, bytes)) machine.fail("an asynchronous copy that does not go to shared memory");
  thread.pending.push_back(
      {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, thread.groups});
  if (machine.chance(4)) land(thread, thread.pending.size() - 1);
}

void commit_copies() { ++machine.running().groups; }

// Copies that were not committed stay under way, as in CUDA.
void wait_for_copies(size_t pending) {
  Thread& thread = machine.running();
  for (size_t i = 0; i < thread.pending.size();) {
    if (thread.pending[i].group + pending < thread.groups) {
      land(thread, i);
    } else {
      ++i;
    }
  }
}

void land(Thread& thread, size_t copy) {
  const Copy& landing = thread.pending[copy];
  memcpy(landing.to, landing.from, landing.bytes);
  thread.pending[copy] = thread.pending.back();
  thread.pending.pop_back();
}

unsigned char* dynamic_memory() { return machine.running().block->memory; }

unsigned char* static_variable(const char* file, int line, size_t bytes) {
  return machine.running().block->memory + machine.variable(file, line, bytes).offset;
}

void check_alignment(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    machine.fail(std::string(what) + " of " + std::to_string(bytes) + " bytes is misaligned");
  }
}

}  // namespace emulator
