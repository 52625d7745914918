"""The public names of the package and what they take; ``python -m tests.docs.public_names`` prints them.

CONTRIBUTING.md says when the output is committed, as ``tests/docs/released/VERSION.txt``.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import unirl_kernels

RELEASED = Path(__file__).parent / "released"


def names() -> dict[str, str]:
    """Each public name, and its parameters as they are written: ``logits, batch, loss, *, readout, plan``."""
    return {name: _parameters(getattr(unirl_kernels, name)) for name in sorted(unirl_kernels.__all__)}


def _parameters(value: object) -> str:
    if not callable(value):
        return ""
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # a class of C's
        return ""
    bare = [p.replace(annotation=p.empty, default=p.empty) for p in parameters if not p.name.startswith("_")]
    return str(inspect.Signature(bare))[1:-1]


def read(text: str) -> dict[str, str]:
    """The inverse of what is printed."""
    return {line.partition("(")[0]: line.partition("(")[2][:-1] for line in text.splitlines()}


def last_released() -> dict[str, str]:
    """The names of the newest release; none before the first."""
    files = sorted(RELEASED.glob("*.txt"), key=lambda path: [int(part) for part in path.stem.split(".")])
    return read(files[-1].read_text()) if files else {}


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names that are new, gone, or take something else."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}({parameters})\n" for name, parameters in names().items())
