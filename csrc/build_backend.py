"""setuptools' build backend (PEP 517) with the requirements of the native kernels: pybind11, and more for CUDA.

The CPU kernels are built without torch. The CUDA kernels are compiled by torch's tools and with torch's CUDA. pip
builds in a separate environment; a torch that it downloads there has several gigabytes, and may have another CUDA
version. So the torch of the environment that pip installs into is used. torch is downloaded only if that environment
has none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_FIND = """
import importlib.metadata, importlib.util
found = importlib.util.find_spec("torch")
if found:
    print(importlib.metadata.version("torch"))
    print(*found.submodule_search_locations)
"""


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiling()]


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiling()]


def _compiling() -> list[str]:
    """Build requirements of the native extensions, without setuptools."""
    mode = os.environ.get("UNIRL_BUILD")
    if mode == "none":
        return []
    if mode != "cuda":
        return ["pybind11>=3"]
    return ["pybind11>=3", "ninja", *([] if importlib.util.find_spec("torch") else [_torch_needed()])]


def _torch_needed() -> str:
    """The package's own requirement of torch."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    found = re.search(r'^dependencies = \["(torch>=[\d.]+)"', text, flags=re.MULTILINE)
    if found is None:
        raise SystemExit("dependencies in pyproject.toml must begin with torch>=RELEASE")
    return found[1]


def _torch_outside() -> str | None:
    """Folder with the torch of the environment that pip installs into; None if torch is missing or too old.

    The interpreter belongs to that environment. pip hides its packages by environment variables, which -E ignores.
    """
    asked = subprocess.run([sys.executable, "-E", "-c", _FIND], capture_output=True, text=True).stdout.splitlines()
    if len(asked) != 2:
        return None
    release, least = (re.findall(r"\d+", text)[:2] for text in (asked[0], _torch_needed()))
    return str(Path(asked[1]).parent) if [*map(int, release)] >= [*map(int, least)] else None


if importlib.util.find_spec("torch") is None and os.environ.get("UNIRL_BUILD") == "cuda":
    outside = _torch_outside()
    if outside:
        sys.path.append(outside)  # after the build environment's own packages
