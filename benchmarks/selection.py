"""Selects the providers of a run."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.levels import level_of
from benchmarks.providers import Provider
from benchmarks.work import Work


def chosen(work: Work, kernels: Sequence[str], peers: Sequence[str], overwrite: bool | None = None) -> list[Provider]:
    """The selected providers, this package's first.

    Args:
        work: the work.
        kernels: of ours: ``all``, ``none``, or names such as ``cpu`` and ``cpu/rows``.
        peers: ``all``, ``none``, or names in ``PEERS`` of the level.
        overwrite: True only those that overwrite an operand, False only those that do not, None both.

    Raises:
        ValueError: when there is none of a name.
    """
    level = level_of(work)
    ours = list(level.ours(work))
    providers = [p for p in ours if _named(kernels, p.kernel, p.kernel.split("/")[0])]
    providers += [p for p in level.peers if _named(peers, p.name)]
    known = {
        "kernels": {n for p in ours for n in (p.kernel, p.kernel.split("/")[0])},
        "peers": {p.name for p in level.peers},
    }
    for option, names in (("kernels", kernels), ("peers", peers)):
        if unknown := set(names) - known[option] - {"all", "none"}:
            expected = ", ".join(("all", "none", *sorted(known[option])))
            raise ValueError(f"--{option} must be among {expected}, got {sorted(unknown)[0]!r}")
    if overwrite is None or not work.has_gradient:
        return [p for p in providers if work.has_gradient or not p.overwrites]
    return [p for p in providers if p.overwrites == overwrite]


def _named(names: Sequence[str], *of: str) -> bool:
    return "all" in names or bool(set(names) & set(of))
