"""An environment for each trainer, and its tests in it: ``python -m tests.integrations.environments [NAME ...]``.

An environment sees what is installed beside this Python, torch above all, and has in front of it what
``tests/integrations/NAME/requirements.txt`` names, without dependencies. It fails where one cannot be made, where a
test fails and where one is skipped. NAME may be ``trl==RELEASE``: the tests of ``trl.patch()`` with that release; what
it does not have is skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "trainers"


TRL = re.compile(r"trl==[\d.]+")
OF_EVERY_TRL = ("test_head.py", "test_logits.py", "test_patch.py", "test_trainers.py")
"""Tests of TRL's functions that hold for every release; ``loss`` and ``fuse`` are for one."""


def names() -> list[str]:
    """Trainers that have an environment of their own."""
    return sorted(path.parent.name for path in HERE.glob("*/requirements.txt"))


def requirements(name: str) -> str:
    return name if TRL.fullmatch(name) else (HERE / name / "requirements.txt").read_text()


def tests(name: str) -> list[str]:
    if not TRL.fullmatch(name):
        return [str(HERE / name)]
    # On a CPU, TRL 1.15's own loss head is a Triton kernel in the interpreter: a training run takes minutes.
    files = OF_EVERY_TRL[:-1] if name.startswith("trl==1.15.") else OF_EVERY_TRL
    return [str(HERE / "trl" / file) for file in files]


def make(name: str) -> Path:
    """The environment's Python.

    Raises:
        CalledProcessError: when something cannot be installed.
    """
    folder = BUILD / name
    python = folder / "bin" / "python"
    wanted, made, listed = requirements(name), folder / "made", folder / "requirements.txt"
    if made.exists() and listed.read_text() == wanted:
        return python
    venv.create(folder, clear=True, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "_shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"DS_BUILD_OPS": "0"}  # DeepSpeed without compiled operators
    listed.write_text(wanted)
    subprocess.run([*pip, "-r", str(listed)], check=True, env=environment)
    made.touch()
    return python


def test(name: str) -> str | None:
    """Make an environment and run the tests in it; what went wrong, or None."""
    try:
        python = make(name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{name}: the environment cannot be made: {error}"
    command = [str(python), "-m", "pytest", "-rs", "-p", "no:cacheprovider", *tests(name)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    sys.stdout.write(done.stdout)
    if done.returncode:
        return f"{name}: tests fail with exit code {done.returncode}"
    counts = done.stdout.splitlines()[-1]
    if " passed" not in counts:
        return f"{name}: no test passed"
    if " skipped" in counts and not TRL.fullmatch(name):
        return f"{name}: tests were skipped"
    return None


def main(chosen: Sequence[str]) -> int:
    """The exit code: 0 when every test of every trainer passed."""
    if unknown := {name for name in chosen if name not in names() and not TRL.fullmatch(name)}:
        known = ", ".join((*names(), "trl==RELEASE"))
        raise SystemExit(f"trainers must be among {known}, got {', '.join(sorted(unknown))}")
    problems = [problem for name in chosen or names() if (problem := test(name)) is not None]
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
