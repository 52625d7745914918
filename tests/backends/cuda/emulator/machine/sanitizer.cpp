// What the kernels call where their alignment and their bounds are checked: they are compiled with
// -fsanitize=alignment,bounds, and these functions stand in for the sanitizer's own library.
#include <stdint.h>

#include "machine.h"

namespace {

struct Location {
  const char* file;
  uint32_t line, column;
};

// Each of the sanitizer's records begins so.
struct Record {
  Location location;
};

[[noreturn]] void fail(const char* what, const Record& record) {
  emulator::machine.fail(emulator::Site{what, record.location.file, static_cast<int>(record.location.line)}.text());
}

}  // namespace

extern "C" {
void __ubsan_handle_type_mismatch_v1(Record* record, uintptr_t) { fail("misaligned access", *record); }
void __ubsan_handle_out_of_bounds(Record* record, uintptr_t) { fail("index out of bounds", *record); }
}
