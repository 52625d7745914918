"""Builds the native extension ``unirl_kernels._C``; everything else stands in pyproject.toml.

Environment:
    UNIRL_BUILD            auto (default) or cpu: the CPU kernels; cuda: the CUDA kernels too, which needs a torch with
                           CUDA and a CUDA toolkit of the same major version; none: pure Python, without torch
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

COMPILE = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# GCC 12 takes the undefined values inside its own intrinsics for uses of uninitialised variables.
COMPILE += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Compiled for OpenMP but not linked with it: the symbols are those of the runtime that torch has loaded, whatever
# its file is called. A second runtime would have its own threads and ignore torch.set_num_threads.
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


class WithoutTorch(build_ext):
    """Stands in where torch is missing: a source distribution can be made, the extension cannot."""

    def run(self) -> None:
        raise SystemExit("torch must be installed before the native extension is built (UNIRL_BUILD=none: without it)")


def extension(mode: str) -> dict[str, Any]:
    """Arguments of ``setup`` for the native extension."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*.c*") if x86 or p.name not in X86_UNITS)
    sources = [str(p) for p in units if "cuda" not in p.parts or mode == "cuda"]
    headers = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")]
    if importlib.util.find_spec("torch") is None:
        native = setuptools.Extension("unirl_kernels._C", sources, depends=headers)
        return {"ext_modules": [native], "cmdclass": {"build_ext": WithoutTorch}}
    if mode == "cuda":
        import torch

        os.environ["CUDA_HOME"] = str(toolkit_for(torch.version.cuda, torch.__version__))  # cpp_extension reads it once
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0;10.0")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    kind, macros = (CUDAExtension, [("UNIRL_WITH_CUDA", None)]) if mode == "cuda" else (CppExtension, [])
    print(f"unirl_kernels: native extension with {os.environ['CUDA_HOME'] if mode == 'cuda' else 'CPU kernels alone'}")
    native = kind(
        "unirl_kernels._C",
        sources,
        define_macros=macros,
        extra_compile_args={"cxx": COMPILE + OPENMP, "nvcc": NVCC},
        depends=headers,
    )
    return {"ext_modules": [native], "cmdclass": {"build_ext": BuildExtension}}


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < MINIMUM_SETUPTOOLS:
        raise SystemExit(f"setuptools must be at least {MINIMUM_SETUPTOOLS}, got {setuptools.__version__}")
    mode = os.environ.get("UNIRL_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"UNIRL_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    setuptools.setup(**({} if mode == "none" else extension(mode)))


if __name__ == "__main__":
    main()
