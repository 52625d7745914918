"""CI, pre-commit and the templates agree with the rest of the project."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.install.test_lock import PROJECT

ROOT = Path(__file__).parents[2]


def parse(name: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture
def workflow() -> dict[str, Any]:
    return parse(".github/workflows/ci.yml")


def commands(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


def test_matrix_has_every_supported_python(workflow: dict[str, Any]) -> None:
    prefix = "Programming Language :: Python :: 3."
    supported = ["3." + name.removeprefix(prefix) for name in PROJECT["classifiers"] if name.startswith(prefix)]
    assert workflow["jobs"]["matrix"]["strategy"]["matrix"]["python"] == supported
    assert PROJECT["requires-python"] == f">={supported[0]}"


def test_oldest_torch_is_the_one_that_is_required(workflow: dict[str, Any]) -> None:
    (required,) = (name.removeprefix("torch>=") for name in PROJECT["dependencies"] if name.startswith("torch>="))
    assert f"'torch=={required}.*'" in commands(workflow["jobs"]["matrix"])
    assert f"torch ≥ {required}" in (ROOT / "README.md").read_text()


def test_ci_runs_what_a_contributor_runs(workflow: dict[str, Any]) -> None:
    assert ".ci/run" in commands(workflow["jobs"]["locked"])
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_hooks_run_tools_of_the_environment() -> None:
    hooks = [hook for repo in parse(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        python, option, module, *rest = shlex.split(hook["entry"])
        assert (python, option) == (".venv/bin/python", "-m")
        assert f"$(PY) -m {module}" in makefile
        assert all((ROOT / name).exists() for name in rest if name.endswith(".py"))


@pytest.mark.parametrize("name", ["bug.md", "objective.md"])
def test_issue_templates_have_a_name(name: str) -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text()
    assert re.match(r"---\nname: .+\nabout: .+\nlabels: \w+\n---\n", text)
    assert text.count("```") % 2 == 0


def test_commands_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name in ("CONTRIBUTING.md", "README.md", ".github/pull_request_template.md"):
        named = re.findall(r"`make ([\w-]+)", (ROOT / name).read_text())
        assert set(named) <= targets, name


MADE = {"docs/latest.md"}
"""Written by commands."""


def test_markdown_is_at_most_100_columns_wide() -> None:
    """But for tables, code, and what cannot be broken: a code span or a link."""
    found = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no checkout")
    for name in set(found.stdout.split()) - MADE:
        text = re.sub(r"^ *```.*?^ *```", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
        for line in text.splitlines():
            prose = re.sub(r"`[^`]*`|\([^) ]*\)", "", line)
            assert len(prose) <= 100 or line.lstrip().startswith(("|", "<")) or line.startswith("    "), (name, line)


MOST_LINES = 60
MOST_PARAMETERS = 25
FOLDERS = ("unirl_kernels", "benchmarks", "examples")


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Every function of the package and its tools, and where it stands."""
    found = []
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        of_file = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        found += [(f"{path.relative_to(ROOT)}:{node.lineno}", node) for node in of_file]
    return found


def lines_of(function: ast.FunctionDef) -> int:
    """Without the docstring, which a public function has to have."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    skipped = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - skipped


def test_functions_are_short() -> None:
    found = {where: lines_of(function) for where, function in functions()}
    assert len(found) > 500
    assert not {where: n for where, n in found.items() if n > MOST_LINES}


def test_kernels_take_few_parameters() -> None:
    kernels = [(where, node) for where, node in functions() if "kernel" in map(ast.unparse, node.decorator_list)]
    assert len(kernels) >= 4
    assert not {where: len(node.args.args) for where, node in kernels if len(node.args.args) > MOST_PARAMETERS}


def test_arguments_have_names() -> None:
    """Nothing passes arguments on untyped; what is traced (``program``) takes those of any torch function."""
    for path in sorted((ROOT / "unirl_kernels").rglob("*.py")):
        assert "*args: Any" not in path.read_text() or path.parent.name == "program", path
