"""Which layers import which, and what an import of the package loads."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "unirl_kernels"

ARROWS = {
    "checks": set(),
    "ranks": {"ranks"},
    "batch": {"checks", "ranks"},
    "counts": {"batch", "checks", "ranks"},
    "plan": set(),
    "readout": set(),
    "testing": {"testing"},
    "program": {"program"},
    "objectives": {"objectives", "program", "batch", "checks", "ranks"},
    "backends": {"backends", "program", "batch"},
    "operators": {"operators", "backends", "batch", "checks", "ranks"},
    "head": {"head", "operators", "objectives", "backends", "batch", "ranks"},
    "api": {
        *{"api", "head", "operators", "backends", "objectives"},
        *{"batch", "checks", "plan", "readout", "ranks"},
    },
    "integrations": {"integrations", "api", "objectives", "batch", "plan", "readout", "ranks"},
    "explain": {"head", "objectives", "program", "backends", "batch", "plan"},
}
"""The layers that each layer may import. ``commands``, on top, may import all."""

SHARED_TOOLS = {"arguments", "disturbance", "measure", "picture", "terminal"}
"""Modules of the bench that the demo uses, and their imports."""

BACKENDS = ("eager", "cpu", "triton", "cuda")


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    return {n.removeprefix("unirl_kernels.") for n in all_imports(path) if n.startswith("unirl_kernels.")}


def all_imports(path: Path) -> set[str]:
    """Modules that a file imports, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {_module(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def _module(package: str, name: str) -> str:
    """What ``from package import name`` loads: a module of that name where there is one."""
    path = PACKAGE.parent.joinpath(*package.split("."), name)
    return f"{package}.{name}" if path.is_dir() or path.with_suffix(".py").exists() else package


def files(layer: str) -> list[Path]:
    return sorted((PACKAGE / layer).rglob("*.py")) or [PACKAGE / f"{layer}.py"]


@pytest.mark.parametrize("layer", ARROWS)
def test_layers(layer: str) -> None:
    for path in files(layer):
        used = {name.split(".")[0] for name in imports(path)} - {"_C"}
        assert used <= ARROWS[layer], f"{path.relative_to(PACKAGE)} imports {sorted(used - ARROWS[layer])}"


def test_backends_do_not_import_one_another() -> None:
    for backend in BACKENDS:
        for path in files(f"backends/{backend}"):
            others = {f"backends.{other}" for other in BACKENDS if other != backend}
            assert not others & {".".join(name.split(".")[:2]) for name in imports(path)}, path


def test_the_package_imports_no_tool() -> None:
    """The package does not import the bench, the demo or the tests, which exist in a checkout only."""
    for path in PACKAGE.rglob("*.py"):
        assert not {name.split(".")[0] for name in all_imports(path)} & {"benchmarks", "examples", "tests"}, path


def test_testing_imports_torch_alone() -> None:
    allowed = {"torch", "unirl_kernels", *sys.stdlib_module_names}
    for path in files("testing"):
        assert {name.split(".")[0] for name in all_imports(path)} <= allowed, path


def test_tools_share_little() -> None:
    """The bench imports no example. The demo imports only ``SHARED_TOOLS`` of the bench."""
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not {name.split(".")[0] for name in all_imports(path)} & {"examples", "tests"}, path
    for path in (ROOT / "examples" / "demo").rglob("*.py"):
        used = {name.removeprefix("benchmarks.") for name in all_imports(path) if name.startswith("benchmarks")}
        assert used <= SHARED_TOOLS, path
    for name in SHARED_TOOLS:
        used = {n for n in all_imports(ROOT / "benchmarks" / f"{name}.py") if n.startswith("benchmarks")}
        assert used <= {f"benchmarks.{tool}" for tool in SHARED_TOOLS}, name


def test_no_import_goes_round_in_a_circle() -> None:
    """Imports inside functions count too."""
    paths = {path: path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    names = {path: ".".join(name.parts).removesuffix(".__init__") for path, name in paths.items()}
    graphlib.TopologicalSorter({name: imports(path) for path, name in names.items()}).prepare()


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_works_without_triton() -> None:
    """In a fresh process where importing triton fails: the package imports, runs, and says why Triton cannot."""
    result = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, unirl_kernels as uk\n"
        "logits, target = torch.randn(2, 3, 7).requires_grad_(), torch.zeros(2, 3, dtype=torch.int64)\n"
        "uk.fused_loss(logits, uk.Batch(target), uk.sft()).loss.backward()\n"
        "print(uk.explain(uk.grpo()))\n"
        "try: uk.token_stats(logits, target, plan=uk.Plan(backend='triton'))\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert result.returncode == 0, result.stderr
    assert "backend 'triton' cannot run on cpu: " in result.stdout


def test_import_is_quick_and_loads_no_backend() -> None:
    """An import loads torch, but not Triton, the native extension or the demo's libraries."""
    result = run(
        "import torch, sys; before = set(sys.modules)\n"
        "import unirl_kernels\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    heavy = {"triton", "numpy", "transformers", "rich", "matplotlib", "sympy", "unirl_kernels._C"}
    assert not heavy & loaded
