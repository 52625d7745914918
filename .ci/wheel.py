"""Build a wheel in an environment without torch, install it in others, and run the tests of what is native there.

    python .ci/wheel.py [TORCH...]      such as torch==2.13.0 "torch==2.11.*", by default the oldest and the newest

One wheel has to run with every torch. The tests import the package from the wheel: they lie in a folder without it. An
environment takes up to six gigabytes, and is removed before the next one is made. ARGS: arguments of pytest.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_AND_NEWEST = ("torch==2.11.*", "torch")
NEEDED = ("numpy>=2", "pytest", "hypothesis", "rich", "packaging")
TESTS = ("tests/api", "tests/backends/cpu", "tests/operators", "tests/head", "tests/objectives")
# What the extension has no part in is left out: other kernels, torch's compiler, Triton's interpreter.
SELECTED = ("-m", "not slow", "-k", "not (triton or cuda or compil or interpreter)", "-p", "no:cacheprovider")
GENERATED = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")


def environment(folder: Path, *packages: str) -> Path:
    """The Python of a new environment with these packages."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    if packages:
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def build(folder: Path) -> Path:
    """The wheel of a copy of the checkout."""
    shutil.copytree(ROOT, folder / "source", ignore=GENERATED)
    python = environment(folder / "builds")
    command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder / "wheel", folder / "source"]
    subprocess.run(command, check=True)
    (wheel,) = (folder / "wheel").iterdir()
    shutil.rmtree(folder / "source" / "unirl_kernels")
    return wheel


def passes(torch: str, wheel: Path, folder: Path) -> bool:
    """Whether the tests pass with a torch."""
    try:
        python = environment(folder / "runs", torch, str(wheel), *NEEDED)
        arguments = shlex.split(os.environ.get("ARGS", "")) or TESTS
        command = [python, "-m", "pytest", *SELECTED, *arguments]
        variables = os.environ | {"OMP_WAIT_POLICY": "passive"}
        return subprocess.run(command, cwd=folder / "source", env=variables).returncode == 0
    finally:
        shutil.rmtree(folder / "runs", ignore_errors=True)


def main(torches: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        wheel = build(Path(name))
        failed = [torch for torch in torches or OLDEST_AND_NEWEST if not passes(torch, wheel, Path(name))]
    sys.stdout.write(
        f"{wheel.name}: " + (f"failed with {', '.join(failed)}" if failed else "every torch passed") + "\n"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
