// Functions that pause and go on later, each on a stack of its own.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <memory>

namespace emulator {

class Fiber {
 public:
  Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Goes on until the fiber's next pause. A new fiber starts the function; one whose function has returned starts it
  // again.
  void resume(void (*function)());

  // Goes back to whoever resumed the fiber that runs now.
  static void pause();

  // Forgets where the fiber is paused. What lies on its stack is not destroyed.
  void abandon() { entered_ = false; }

  // Whether the stack was too small.
  bool overflowed() const;

 private:
  static void loop();

  std::unique_ptr<unsigned char[]> stack_;
  ucontext_t entry_;
  jmp_buf at_;
  void (*function_)() = nullptr;
  bool entered_ = false;
};

}  // namespace emulator
