"""The extension with its CUDA kernels compiles, links and loads where torch is built with CUDA; no GPU is needed.

``UNIRL_CUDA_PYTHON`` names an interpreter with such a torch, where that of the tests has none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ROOT

PYTHON = os.environ.get("UNIRL_CUDA_PYTHON") or (sys.executable if torch.version.cuda else None)
LOADED = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("unirl_kernels._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*sorted(name for name in dir(module.cuda) if not name.startswith("__")))
"""


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="needs a torch that is built with CUDA (UNIRL_CUDA_PYTHON names one)")
def test_extension_links(tmp_path: Path) -> None:
    assert PYTHON is not None
    environment = os.environ | {"UNIRL_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0"}
    folders = ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    build = [PYTHON, "setup.py", "-q", "build_ext", *folders]
    done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    (library,) = (tmp_path / "lib" / "unirl_kernels").glob("_C*.so")
    loaded = subprocess.run([PYTHON, "-c", LOADED, library], capture_output=True, text=True)
    assert loaded.stdout.split() == ["fused_loss", "scale_", "token_stats", "token_stats_backward"], loaded.stderr
