"""Builds the native extension ``unirl_kernels._C``; everything else stands in pyproject.toml.

Environment:
    UNIRL_BUILD            auto (default): the CPU kernels, and the CUDA kernels where torch has CUDA and nvcc is
                           found; cpu: the CPU kernels; cuda: both, an error where CUDA is missing; none: pure Python
    TORCH_CUDA_ARCH_LIST   CUDA architectures, default "9.0;10.0"
    MAX_JOBS               compilers at a time, default one per core
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
X86_UNITS = ("avx512.cpp", "avx2.cpp", "panels_avx512.cpp", "panels_avx512_bf16.cpp", "panels_avx2.cpp")
"""Units for x86 alone; each names its own instruction set in a pragma, so that all share one set of flags."""

COMPILE = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# GCC 12 takes the undefined values inside its own intrinsics for uses of uninitialised variables.
COMPILE += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Compiled for OpenMP but not linked with it: the symbols are those of the runtime that torch has loaded, whatever
# its file is called. A second runtime would have its own threads and ignore torch.set_num_threads.
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]
NVCC = ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]


def cuda_missing(sources: list[str]) -> str | None:
    """None where the CUDA kernels can be built, else the reason why not."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not sources:
        return "there are no .cu files in csrc"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "nvcc is not found (set CUDA_HOME)"
    return None


def extension(mode: str) -> dict[str, Any]:
    """Arguments of ``setup`` for the native extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*.c*") if x86 or p.name not in X86_UNITS)
    cpp = [str(p) for p in units if "cuda" not in p.parts]
    cuda = [str(p) for p in units if "cuda" in p.parts]
    reason = "UNIRL_BUILD=cpu" if mode == "cpu" else cuda_missing(cuda)
    if mode == "cuda" and reason:
        raise SystemExit(f"UNIRL_BUILD=cuda: {reason}")
    if reason:
        kind, sources, macros = CppExtension, cpp, []
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0;10.0")
        kind, sources, macros = CUDAExtension, cpp + cuda, [("UNIRL_WITH_CUDA", None)]
    print(f"unirl_kernels: native extension {'without CUDA: ' + reason if reason else 'with CUDA'}")
    native = kind(
        "unirl_kernels._C",
        sources,
        define_macros=macros,
        extra_compile_args={"cxx": COMPILE + OPENMP, "nvcc": NVCC},
        depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")],
    )
    return {"ext_modules": [native], "cmdclass": {"build_ext": BuildExtension}}


mode = os.environ.get("UNIRL_BUILD", "auto")
if mode not in MODES:
    raise SystemExit(f"UNIRL_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
setup(**({} if mode == "none" else extension(mode)))
