"""Builds the native extensions; everything else stands in pyproject.toml.

``unirl_kernels._C`` has the CPU kernels. It calls no function of torch by name, needs no torch to be built, and runs
with any torch that the package supports. ``unirl_kernels._cuda`` has the CUDA kernels.

Environment:
    UNIRL_BUILD            auto (default) or cpu: the CPU kernels; cuda: the CUDA kernels too, which needs a torch with
                           CUDA and a CUDA toolkit of the same major version; none: pure Python, without a compiler
    CUDA_HOME              the CUDA toolkit; otherwise that of the nvcc on PATH, then the usual folders
    TORCH_CUDA_ARCH_LIST   CUDA architectures, default "9.0;10.0"
    MAX_JOBS               compilers at a time, default one per core
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_SETUPTOOLS = 77  # the first that reads the form of the licence in pyproject.toml
MODES = ("auto", "none", "cpu", "cuda")
X86_UNITS = ("avx512.cpp", "avx2.cpp", "panels_avx512.cpp", "panels_avx512_bf16.cpp", "panels_avx2.cpp")
"""Units for x86 alone; each names its own instruction set in a pragma, so that all share one set of flags."""

COMPILE = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# GCC 12 takes the undefined values inside its own intrinsics for uses of uninitialised variables.
COMPILE += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Compiled for OpenMP but not linked with it: the symbols are those of the runtime that torch has loaded, for all to
# see, whatever its file is called. A second one would have its own threads and ignore torch.set_num_threads.
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]
NVCC = ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]


def toolkits() -> list[Path]:
    """Folders where a CUDA toolkit may be, the one that was asked for first."""
    asked = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if asked:
        return [Path(asked[0])]
    found = [*_of_nvcc_on_path(), Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    if os.environ.get("CONDA_PREFIX"):
        found.append(Path(os.environ["CONDA_PREFIX"], "targets", f"{platform.machine()}-linux"))
        found.append(Path(os.environ["CONDA_PREFIX"]))
    # Where pip puts it: nvidia-cuda-nvcc and nvidia-cuda-runtime of CUDA 13.
    found += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*"), reverse=True)
    return list(dict.fromkeys(found))


def _of_nvcc_on_path() -> list[Path]:
    """The toolkit that the nvcc on PATH belongs to: by its own word, since it may be a script that calls another."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    tops = re.findall(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, flags=re.MULTILINE)
    return [Path(os.path.normpath(top.strip())) for top in tops[:1]] + [Path(nvcc).resolve().parents[1]]


def version_of(toolkit: Path) -> str | None:
    """Version of a toolkit that can compile, such as "13.0"; None where something is missing in the folder."""
    header = toolkit / "include" / "cuda.h"
    if not ((toolkit / "include" / "cuda_runtime.h").exists() and (toolkit / "bin" / "nvcc").exists()):
        return None
    defined = re.search(r"#define\s+CUDA_VERSION\s+(\d+)", header.read_text()) if header.exists() else None
    return f"{int(defined[1]) // 1000}.{int(defined[1]) % 1000 // 10}" if defined else "unknown"


def toolkit_for(cuda: str | None, torch: str) -> Path:
    """The toolkit for torch ``torch``, built with CUDA ``cuda``.

    Raises:
        SystemExit: where there is none; says where it looked.
    """
    if cuda is None:
        raise SystemExit(f"UNIRL_BUILD=cuda: torch must be built with CUDA, got torch {torch}, which is not")
    major, looked = cuda.split(".")[0], []
    for folder in toolkits():
        version = version_of(folder)
        if version is not None and version.split(".")[0] == major:
            return folder
        looked.append(f"  {folder}: " + (f"CUDA {version}" if version else "no include/cuda_runtime.h and bin/nvcc"))
    raise SystemExit(
        f"UNIRL_BUILD=cuda: a toolkit of CUDA {major} must be installed, as torch {torch} is built with CUDA {cuda}. "
        "Looked in\n" + "\n".join(looked) + "\n"
        "CUDA_HOME names the folder that holds include/cuda_runtime.h and bin/nvcc."
    )


class Incomplete(build_ext):
    """Stands in where something is missing: a source distribution can be made, an extension cannot."""

    missing = ""

    def run(self) -> None:
        raise SystemExit(f"{self.missing} must be installed before the native extension is built")


def sources(folder: str) -> list[str]:
    """Units of a folder of csrc, and those that all extensions have."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / folder).glob("*.c*")]
    units = [unit for unit in units if x86 or unit.name not in X86_UNITS]
    return sorted(str(unit.relative_to(ROOT)) for unit in units)


def extension(mode: str) -> dict[str, Any]:
    """Arguments of ``setup`` for the native extensions."""
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    folders = {"_C": "cpu", "_cuda": "cuda"} if mode == "cuda" else {"_C": "cpu"}
    natives = [
        setuptools.Extension(f"unirl_kernels.{name}", sources(folder), depends=headers, language="c++")
        for name, folder in folders.items()
    ]
    for needed in ("pybind11", "torch") if mode == "cuda" else ("pybind11",):
        if importlib.util.find_spec(needed) is None:
            command = type("build_ext", (Incomplete,), {"missing": needed})
            return {"ext_modules": natives, "cmdclass": {"build_ext": command}}
    import pybind11
    from pybind11.setup_helpers import ParallelCompile

    native = natives[0]
    native.include_dirs = [pybind11.get_include()]
    native.extra_compile_args = COMPILE + OPENMP
    if mode == "cuda":
        return with_cuda(native)
    print("unirl_kernels: native extension with CPU kernels alone")
    newest = max((ROOT / header).stat().st_mtime for header in headers)
    ParallelCompile("MAX_JOBS", needs_recompile=lambda unit, source: is_stale(unit, source, newest)).install()
    return {"ext_modules": [native]}


def is_stale(compiled: str, source: str, newest_header: float) -> bool:
    """Whether a unit has to be compiled."""
    if not os.path.exists(compiled):
        return True
    return os.stat(compiled).st_mtime <= max(os.stat(source).st_mtime, newest_header)


def with_cuda(native: setuptools.Extension) -> dict[str, Any]:
    """Arguments of ``setup`` for the CPU kernels and the CUDA kernels."""
    import torch

    os.environ["CUDA_HOME"] = str(toolkit_for(torch.version.cuda, torch.__version__))  # cpp_extension reads it once
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0;10.0")
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    print(f"unirl_kernels: native extensions, CUDA kernels with {os.environ['CUDA_HOME']}")
    cuda = CUDAExtension(
        "unirl_kernels._cuda",
        sources("cuda"),
        include_dirs=native.include_dirs,
        extra_compile_args={"cxx": COMPILE, "nvcc": NVCC},
        depends=native.depends,
    )
    return {"ext_modules": [native, cuda], "cmdclass": {"build_ext": BuildExtension}}


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < MINIMUM_SETUPTOOLS:
        raise SystemExit(f"setuptools must be at least {MINIMUM_SETUPTOOLS}, got {setuptools.__version__}")
    mode = os.environ.get("UNIRL_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"UNIRL_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    setuptools.setup(**({} if mode == "none" else extension(mode)))


if __name__ == "__main__":
    main()
