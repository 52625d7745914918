"""The pages of the site: their examples run, they name what exists, and the site builds without a warning."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import unirl_kernels as uk
from tests import ROOT
from tests.docs.test_docstrings import run
from unirl_kernels import objectives

PAGES = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
ENTRY = re.compile(r"^::: ([\w.]+)$", flags=re.MULTILINE)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
OBJECTIVES = [
    f"{value.__module__}.{value.__qualname__}"
    for value in (getattr(objectives, name) for name in objectives.__all__)
    if isinstance(value, type) and issubclass(value, objectives.Objective) and value is not objectives.Objective
]
VARIABLE = re.compile(r"(?:environ(?:\.get)?[(\[]|getenv\()\"(UNIRL_\w+)\"")


def test_every_public_name_has_an_entry() -> None:
    entries = {name for text in PAGES.values() for name in ENTRY.findall(text)}
    assert [name for name in uk.__all__ if f"unirl_kernels.{name}" not in entries] == []


OF_KERNELS = "hub.md"
"""Its example needs a library and a build: tests/install/test_kernel.py runs it."""
OF_RANKS = "ranks.md"
"""Its examples need a group: test_ranks.py runs them."""
OF_TRAINERS = [f"trainers/{name}.md" for name in ("openrlhf", "llamafactory", "swift", "unsloth", "prime_rl")]
"""Pages whose examples need a trainer that has an environment of its own (``make test-trainers``)."""


@pytest.mark.parametrize("page", OF_TRAINERS)
def test_examples_of_trainers_name_what_exists(page: str) -> None:
    ours = [line for _, text in FENCE.findall(PAGES[page]) for line in text.splitlines() if "unirl_kernels" in line]
    assert ours
    for line in ours:
        exec(compile(line, page, "exec"), {})
    for _, text in FENCE.findall(PAGES[page]):
        compile(text, page, "exec")


RUN_ELSEWHERE = {*OF_TRAINERS, OF_RANKS, OF_KERNELS}


@pytest.mark.parametrize("page", [name for name in PAGES if FENCE.search(PAGES[name]) and name not in RUN_ELSEWHERE])
def test_examples_run(page: str) -> None:
    """In their order, as in one session."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for language, text in FENCE.findall(PAGES[page]):
        if language == "python":
            exec(compile(text, page, "exec"), names)
        elif language == "pycon":
            example = doctest.DocTestParser().get_doctest(text, names, page, page, 0)
            assert run(example, keep=True) == ""
            names = example.globs
        else:
            assert language in ("sh", "text", "yaml")


def test_variables_of_the_environment_are_named() -> None:
    sources = [path for kind in ("unirl_kernels/**/*.py", "csrc/**/*.[ch]*") for path in ROOT.glob(kind)]
    read = {name for path in [ROOT / "setup.py", *sources] for name in VARIABLE.findall(path.read_text())}
    assert {"UNIRL_BUILD", "UNIRL_CPU_ISA"} <= read
    assert [name for name in sorted(read) if f"`{name}`" not in PAGES["backends.md"]] == []


def test_site_builds_without_a_warning_and_has_every_name(tmp_path: Path) -> None:
    """As ``make docs`` builds it."""
    for module in ("material", "mkdocstrings"):
        pytest.importorskip(module, reason="what builds the site is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem: path.read_text() for path in tmp_path.rglob("*.html")}
    assert [name for name in uk.__all__ if f'id="unirl_kernels.{name}"' not in pages["reference"]] == []
    assert [name for name in OBJECTIVES if f'id="{name}"' not in pages["objectives"]] == []
    assert "Level 1" in pages["index"]
    assert "trl.patch()" in re.sub("<[^>]+>", "", pages["trl"])
    assert [page for page, text in pages.items() if "{{" in text] == []
