"""``python -m benchmarks``: see ``options``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.imports import uncollected


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; ``arguments`` and what is returned are those of ``unirl_kernels.commands.cli.main``."""
    with uncollected():
        from benchmarks import options
        from unirl_kernels.commands.cli import run_alone
    return run_alone(options, "python -m benchmarks", arguments)


if __name__ == "__main__":
    sys.exit(main())
