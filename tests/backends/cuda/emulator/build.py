"""Compiles ``csrc/cuda`` against the emulator, to Python modules like the CUDA part of the native extension.

They are kept under ``build/``, and compiled anew where a source, a header or a flag has changed: about twenty seconds.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.backends.cuda.emulator.translate import translate

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
BUILD = ROOT / "build" / "cuda_emulator"
MODULE = "emulated_kernels"
CXX = shutil.which("g++") or shutil.which("c++")

# longjmp refuses to leave a stack where it is fortified.
FLAGS = (
    "-std=c++20 -O1 -march=native -fPIC -fvisibility=hidden -ffp-contract=fast -fno-strict-aliasing -U_FORTIFY_SOURCE"
)
KERNEL_FLAGS = "-x c++ -include cuda_runtime.h -D__CUDACC__ -D__CUDA_ARCH__=900 -fsanitize=alignment,bounds -w"

Change = Callable[[Path, str], str]
"""What becomes of a source, given its path under csrc and its text."""


def unchanged(path: Path, source: str) -> str:
    return source


@cache
def load(name: str, change: Change = unchanged) -> ModuleType:
    """The kernels as a module, compiled first where they have to be.

    Args:
        name: of their folder under ``build/``.
        change: is applied to the sources before they are translated.

    Raises:
        RuntimeError: when a compiler is missing or fails, with what it said.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # workers of a test run want it at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = _link(BUILD / name, _host_objects(), change)
    spec = importlib.util.spec_from_file_location(f"{name}.{MODULE}", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _host_objects() -> list[Path]:
    """The emulator and the bindings: the same for all kernels, whatever was changed in them."""
    import pybind11  # not where a wheel is tested

    folder = BUILD / "host"
    csrc = _translate(folder, unchanged)
    system = " ".join(f"-isystem {path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))
    flags = dict.fromkeys(sorted((HERE / "machine").glob("*.cpp")), "-Wall")
    # The bindings are included in the emulator's module, which takes the place of the extension's.
    units = (unit for unit in csrc if unit.suffix == ".cpp" and unit.stem not in ("bindings", "module"))
    flags |= dict.fromkeys(units, f"-w {system}")
    flags[HERE / "module.cpp"] = f"-w -DUNIRL_EMULATOR={MODULE} {system}"
    return _ninja(folder, flags)


def _link(folder: Path, host: list[Path], change: Change) -> Path:
    csrc = _translate(folder, change)
    kernels = {unit: KERNEL_FLAGS for unit in csrc if unit.suffix == ".cu"}
    library = folder / f"{MODULE}.so"
    _ninja(folder, kernels, library, host)
    return library


def _translate(folder: Path, change: Change) -> list[Path]:
    """Writes what kernels and bindings may include, translated; returns the files."""
    csrc = ROOT / "csrc"
    written = []
    for source in sorted([*csrc.glob("*.*"), *csrc.glob("cuda/*.*")]):
        path = source.relative_to(csrc)
        written.append(folder / "csrc" / path)
        _write(written[-1], translate(change(path, source.read_text()), f"csrc/{path}"))
    return written


def _ninja(
    folder: Path, units: dict[Path, str], library: Path | None = None, others: Iterable[Path] = ()
) -> list[Path]:
    """Compiles units with flags of their own, and links them with other objects to a library; returns the objects."""
    ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if CXX is None or ninja is None:
        raise RuntimeError("the emulator needs a C++ compiler and ninja")
    includes = " ".join(f"-I{path}" for path in (HERE / "include", HERE, folder))
    objects = {unit: folder / "objects" / f"{unit.stem}.o" for unit in units}
    rules = [
        f"rule compile\n command = {CXX} -MMD -MF $out.d {FLAGS} {includes} $flags -c $in -o $out",
        " depfile = $out.d\n deps = gcc",
        f"rule link\n command = {CXX} -shared -o $out $in",
        *(f"build {objects[unit]}: compile {unit}\n flags = {flags}" for unit, flags in units.items()),
    ]
    if library is not None:
        rules.append(f"build {library}: link {' '.join(map(str, [*objects.values(), *others]))}")
    _write(folder / "build.ninja", "\n".join(rules) + "\n")
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    done = subprocess.run([ninja, "-C", folder, "-j", jobs], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the emulator does not compile:\n{done.stdout[-6000:]}")
    return list(objects.values())


def _write(path: Path, text: str) -> None:
    """Leaves a file alone that holds the text already, so that it is not newer than what was made of it."""
    with suppress(FileNotFoundError):
        if path.read_text() == text:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
