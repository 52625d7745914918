"""Copies of the checkout's files, and ``setup.py`` as a module, so that tests write nothing into the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
GENERATED = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")


def copy_to(folder: Path) -> Path:
    """What a distribution is built from, as in a fresh clone."""
    folder.mkdir()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "unirl_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=GENERATED)
    return folder


def files_of(folder: Path) -> set[str]:
    """Paths of all files in a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def load_setup(folder: Path = ROOT) -> ModuleType:
    """``setup.py`` of a folder, without running it."""
    spec = importlib.util.spec_from_file_location("setup_of_unirl_kernels", folder / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(
    command: Sequence[str],
    folder: Path,
    *,
    path: Sequence[Path] = (),
    python: str | None = None,
    seconds: int = 300,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run Python, this one or another, in a folder, with nothing of this process's settings of the build."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UNIRL_", "CUDA_", "PYTHONPATH"))}
    if path:
        kept["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.run(
        [python or sys.executable, *command],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
