"""Files and commands named in CONTRIBUTING and DESIGN exist. ``make test`` leaves out only the slow tests."""

from __future__ import annotations

import re
import shlex
import subprocess
from shutil import which

import pytest

from tests import ROOT

TEXTS = {name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "DESIGN.md")}
COMMANDS = sorted({line for text in TEXTS.values() for line in re.findall(r"`(make [^`]+)`", text)})
PATH = re.compile(r"`((?:examples|tests|unirl_kernels|benchmarks|csrc)/[\w./]*\w|[A-Z]+\.md)`")

makes = pytest.mark.skipif(which("make") is None, reason="make is not installed")


def plan(command: str) -> str:
    """The commands that make would run."""
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@makes
@pytest.mark.parametrize("command", COMMANDS)
def test_make_knows_its_targets(command: str) -> None:
    assert plan(command)


@makes
def test_slow_tests_are_left_to_test_all() -> None:
    (daily,) = (line for line in plan("make test").splitlines() if "-m pytest" in line)
    (every,) = (line for line in plan("make test-all").splitlines() if "-m pytest" in line)
    assert '-m "not slow"' in daily
    assert every == "UNIRL_COMPILE_GATE=full " + daily.replace(' -m "not slow"', "")


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name: str) -> None:
    named = set(PATH.findall(TEXTS[name]))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
