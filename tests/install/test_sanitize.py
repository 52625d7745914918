"""What ``make sanitize`` reports: faults in small libraries that are compiled and run as the kernels are."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

SOURCE = """
#include <thread>
extern "C" int beyond(int n) { int* x = new int[n]; int y = x[n / n * n]; delete[] x; return y; }
extern "C" int overflow(int n) { return 2147483000 + 1000 * n; }
extern "C" int race(int n) {
  int x = 0;
  std::thread other([&] { for (int i = 0; i < n; ++i) x += i; });
  for (int i = 0; i < n; ++i) x -= i;
  other.join();
  return x;
}
extern "C" int sound(int n) { return n; }
"""


@pytest.fixture(scope="module")
def sanitize() -> ModuleType:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / ".ci" / "sanitize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sanitize"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "fault", "report"),
    [
        ("address", "beyond", "heap-buffer-overflow"),
        ("address", "overflow", "signed integer overflow"),
        ("thread", "race", "data race"),
        ("address", "sound", ""),
        ("thread", "sound", ""),
    ],
)
def test_a_planted_fault_is_reported(name: str, fault: str, report: str, sanitize: ModuleType, tmp_path: Path) -> None:
    sanitizer, library = sanitize.SANITIZERS[name], tmp_path / "planted.so"
    # As Python's own flags, and those of setup.py, which come last.
    flags = ["-shared", "-fPIC", "-fwrapv", *sanitizer.flags.split(), "-O0", "-g0"]
    subprocess.run(["g++", *flags, "-x", "c++", "-", "-o", library], input=SOURCE, text=True, check=True)
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).{fault}(5000))"
    run = subprocess.run(
        [sys.executable, "-c", code], env=sanitize.environment(sanitizer), capture_output=True, text=True, timeout=100
    )
    assert report in run.stderr
    assert bool(run.returncode) == bool(report), run.stderr


def test_commands_name_what_there_is(sanitize: ModuleType) -> None:
    for sanitizer in sanitize.SANITIZERS.values():
        for command in sanitizer.commands:
            assert all((ROOT / argument).exists() for argument in command if argument.endswith(".py"))
        for path, other in sanitizer.replaced.items():
            assert (ROOT / "csrc" / path).exists()
            assert other.exists()
    with pytest.raises(SystemExit, match="a sanitizer must be one of address, thread, got memory"):
        sanitize.main(["memory"])
