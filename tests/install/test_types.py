"""The type check does not depend on the types of other packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported() -> set[str]:
    """Packages that this one imports, but for torch, whose types are followed, and the standard library."""
    names: set[str] = set()
    for path in (ROOT / "unirl_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"torch", "unirl_kernels"}


def test_other_packages_may_change_their_types(tmp_path: Path) -> None:
    """In the place of each stands a package without any of the names that are used."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    names = imported()
    assert {"transformers", "triton"} <= names
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("def __getitem__(x: int) -> int: return x\n")
        (tmp_path / name / "py.typed").touch()
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache")]
    paths = {"MYPYPATH": str(tmp_path), "PATH": ""}
    result = subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
