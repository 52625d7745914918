#include "fiber.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr uint64_t CANARY = 0x5ca1ab1e0ddba11;  // at the end of a stack, where only an overflow writes

Fiber* running = nullptr;
jmp_buf resumer;

}  // namespace

// Memory of a stack is touched, and so taken, only as far as it is used.
Fiber::Fiber() : stack_(new unsigned char[STACK_BYTES]) { memcpy(stack_.get(), &CANARY, sizeof CANARY); }

// A context is entered once, by setcontext, which asks the kernel for the signal mask. All later switches are jumps:
// they take nanoseconds.
void Fiber::resume(void (*function)()) {
  running = this;
  function_ = function;
  if (_setjmp(resumer) != 0) return;
  if (entered_) _longjmp(at_, 1);
  entered_ = true;
  getcontext(&entry_);
  entry_.uc_stack.ss_sp = stack_.get();
  entry_.uc_stack.ss_size = STACK_BYTES;
  entry_.uc_link = nullptr;
  makecontext(&entry_, loop, 0);
  setcontext(&entry_);
  abort();
}

void Fiber::pause() {
  if (_setjmp(running->at_) == 0) _longjmp(resumer, 1);
}

void Fiber::loop() {
  for (;;) {
    running->function_();
    pause();
  }
}

bool Fiber::overflowed() const { return memcmp(stack_.get(), &CANARY, sizeof CANARY) != 0; }

}  // namespace emulator
