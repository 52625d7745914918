"""Compile the native CPU kernels with gcc's sanitizers, each in a folder of its own, and run what reaches them.

    python .ci/sanitize.py [address] [thread]      both by default

address   AddressSanitizer and UndefinedBehaviorSanitizer: memory beyond a tensor's end, overflows, misalignment
thread    ThreadSanitizer. It cannot see how the threads of an OpenMP runtime wait for each other, so the kernels get
          threads of the C++ library (threads.cpp in place of csrc/cpu/parallel.cpp), torch itself one thread.

The folder is build/sanitize/NAME. The status is 0 where no test failed and nothing was reported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitize"
COPIED = ("unirl_kernels", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml", "README.md")
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
KERNELS = tuple(f"tests/backends/cpu/test_{name}.py" for name in ("native", "rows", "matmuls", "accuracy"))
FUZZ_CASES = "300"
"""On each instruction set."""
NOT_TRITON = ("--skip", "triton")
"""Triton's kernels read whole aligned 16 bytes, up to 15 beyond a row: that never leaves a page, and is no fault."""


NOT_OPENMP = ("-k", "not no_symbol_of_torch and not threads_are_those_of_torch")
"""They ask for the OpenMP runtime, which ``thread`` replaces."""


@dataclass(frozen=True)
class Sanitizer:
    """How the kernels are compiled and run.

    Args:
        flags: of compiler and linker.
        runtime: library that has to be loaded before all others.
        options: environment.
        replaced: file of csrc -> what is compiled in its place.
        commands: arguments of Python.
    """

    flags: str
    runtime: str
    options: dict[str, str]
    commands: tuple[tuple[str, ...], ...]
    replaced: dict[str, Path] = field(default_factory=dict)


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
SANITIZERS = {
    "address": Sanitizer(
        # Python's own flags have -fwrapv, which makes overflows defined.
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -fno-wrapv",
        "libasan.so",
        # Python keeps what it allocated until it ends: none of that is a leak of the kernels.
        {"ASAN_OPTIONS": "detect_leaks=0:exitcode=99", "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "2"},
        (
            (*PYTEST, *KERNELS),
            ("-m", "tests.fuzz", "--seconds=100000", f"--cases={FUZZ_CASES}", "--seed=77", *NOT_TRITON, "--isa"),
        ),
    ),
    "thread": Sanitizer(
        "-fsanitize=thread",
        "libtsan.so",
        {"TSAN_OPTIONS": f"exitcode=66:suppressions={ROOT / '.ci' / 'threads.suppressions'}", "OMP_NUM_THREADS": "1"},
        ((*PYTEST, *KERNELS, *NOT_OPENMP), (*PYTEST, "tests/api/test_promises.py", "-k", "threads")),
        {"cpu/parallel.cpp": ROOT / ".ci" / "threads.cpp"},
    ),
}


def library(name: str) -> str:
    """Path of a library of the compiler."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    path = found.stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"gcc must have {name}, which comes with its sanitizers, got none")
    return path


def environment(sanitizer: Sanitizer) -> dict[str, str]:
    """For a Python that loads what was compiled so."""
    # The C++ library too, so that its exceptions are followed.
    preloaded = " ".join(map(library, (sanitizer.runtime, "libstdc++.so")))
    return os.environ | sanitizer.options | {"LD_PRELOAD": preloaded, "OMP_WAIT_POLICY": "passive"}


def build(name: str) -> Path:
    """Compile a copy of the checkout's files; the folder that holds it."""
    sanitizer, folder = SANITIZERS[name], FOLDER / name
    for tree in (*COPIED, "build"):
        shutil.rmtree(folder / tree, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z", *COPIED], cwd=ROOT, check=True, capture_output=True, text=True)
    for path in filter(None, listed.stdout.split("\0")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    for path, other in sanitizer.replaced.items():
        shutil.copy(other, folder / "csrc" / path)
    flags = {"CFLAGS": sanitizer.flags, "LDFLAGS": sanitizer.flags, "UNIRL_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=os.environ | flags, check=True, stdout=subprocess.DEVNULL)
    return folder


def check(name: str, folder: Path) -> list[str]:
    """Run everything on each instruction set; the commands that failed or reported something."""
    found, sanitizer = [], SANITIZERS[name]
    for instruction_set in INSTRUCTION_SETS:
        for command in sanitizer.commands:
            whole = [sys.executable, *command, *([instruction_set] if command[-1] == "--isa" else [])]
            sys.stdout.write(f"{name}, {instruction_set}: {' '.join(whole)}\n")
            sys.stdout.flush()
            variables = environment(sanitizer) | {"UNIRL_CPU_ISA": instruction_set}
            status = subprocess.run(whole, cwd=folder, env=variables).returncode
            if status:
                found.append(f"{name}, {instruction_set}: status {status} of {' '.join(command)}")
    return found


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in SANITIZERS]
    if unknown:
        raise SystemExit(f"a sanitizer must be one of {', '.join(SANITIZERS)}, got {unknown[0]}")
    found = [problem for name in names or SANITIZERS for problem in check(name, build(name))]
    sys.stdout.write("\n".join(found or ["nothing was reported"]) + "\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
