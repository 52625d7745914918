"""The CUDA kernels compiled and linked for real, with a torch that is built with CUDA; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.install.checkout import copy_to, run

PYTHON = os.environ.get("UNIRL_TEST_CUDA_PYTHON")
"""An interpreter whose torch is built with CUDA and which has setuptools, pybind11,
ninja and a toolkit (CUDA_HOME or found)."""

LOADED = """
import torch, unirl_kernels._cuda as native
print(*sorted(name for name in vars(native) if not name.startswith("_")))
x = torch.zeros(1, 2, 8)
try:
    native.scale_(x, torch.ones(()))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="UNIRL_TEST_CUDA_PYTHON names no interpreter")
def test_cuda_extension_compiles_links_and_loads(tmp_path: Path) -> None:
    folder = copy_to(tmp_path / "checkout")
    toolkit = {"CUDA_HOME": os.environ["CUDA_HOME"]} if "CUDA_HOME" in os.environ else {}
    build = ["setup.py", "-q", "build_ext", "--inplace"]
    built = run(build, folder, python=PYTHON, seconds=3600, UNIRL_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0", **toolkit)
    assert built.returncode == 0, built.stderr[-4000:]
    found = run(["-c", LOADED], folder, python=PYTHON)
    assert found.returncode == 0, found.stderr
    names, refused = found.stdout.splitlines()
    assert names == "fused_loss scale_ token_stats token_stats_backward"
    assert "must be on a CUDA device" in refused
    (library,) = (folder / "unirl_kernels").glob("_cuda.*.so")
    kernels = subprocess.run(["strings", "-a", library], capture_output=True, text=True, check=True).stdout
    assert "sm_90" in kernels
