"""Each public function and class has a docstring that names its parameters and whose examples run."""

from __future__ import annotations

import doctest
import inspect
import re
from typing import Any

import pytest
import torch

import unirl_kernels as uk
from unirl_kernels import objectives

PUBLIC = sorted(name for name in uk.__all__ if callable(getattr(uk, name)))
GLOBALS = {"torch": torch, "uk": uk}
"""What an example finds, as the reference page says."""


def examples_of(value: Any, name: str) -> list[doctest.DocTest]:
    """The docstring of an object and of its members, where they hold examples."""
    return [found for found in doctest.DocTestFinder().find(value, name, globs=GLOBALS) if found.examples]


def run(found: doctest.DocTest, keep: bool = False) -> str:
    """What failed; ``keep`` leaves the names that the example made."""
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(found, out=said.append, clear_globs=not keep)
    return "".join(said)


def described(text: str) -> list[str]:
    """The names in the section Args of a docstring."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", inspect.cleandoc(text) + "\n", flags=re.MULTILINE)
    heads = re.findall(r"^    (\w[\w, ]*):", section[1], flags=re.MULTILINE) if section else []
    return [name for head in heads for name in head.split(", ")]


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name: str) -> None:
    found = {test.name: test for test in examples_of(getattr(uk, name), name)}
    assert name in found, f"{name} must have an example"
    assert len(found[name].examples) <= 6
    assert [said for test in found.values() if (said := run(test))] == []


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "UnsupportedOperation"])  # made by the package
def test_parameters_are_described(name: str) -> None:
    value = getattr(uk, name)
    taken = [p for p in inspect.signature(value).parameters if not p.startswith("_")]
    assert described(value.__doc__) == taken


@pytest.mark.parametrize("name", sorted(objectives.__all__))
def test_examples_of_objectives_run(name: str) -> None:
    value = getattr(objectives, name)
    assert [said for found in examples_of(value, name) if (said := run(found))] == []


def test_an_example_that_is_wrong_fails() -> None:
    def wrong() -> None:
        """>>> uk.IGNORE
        0
        """

    (found,) = examples_of(wrong, "wrong")
    assert run(found).endswith("Got:\n    -100\n")
