"""Every test of this folder names a report."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path for path in HERE.glob("test_*.py") if path.name != Path(__file__).name)
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull|blob)/[\w./-]+")


def _tests_of(path: Path) -> list[ast.FunctionDef]:
    found = ast.parse(path.read_text()).body
    return [node for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_test_says_where_it_was_reported(path: Path) -> None:
    silent = [test.name for test in _tests_of(path) if not ADDRESS.search(ast.get_docstring(test) or "")]
    assert not silent


def test_there_are_sixty() -> None:
    assert sum(len(_tests_of(path)) for path in FILES) >= 60
