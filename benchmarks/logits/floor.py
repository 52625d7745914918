"""The lower bound of the time of work on logits: memory traffic at the bandwidth of ``copy_``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.buffers import Ring
from benchmarks.work import FORWARD_BACKWARD, FUSED, STATS, STATS_BACKWARD, Work


def floor(work: Work) -> dict[str, int]:
    """Memory traffic that no kernel can do without: valid rows read, and every row of the gradient written.

    Statistics come before a gradient that depends on all of them, so that such a loss reads twice.
    """
    reads = {STATS: 1, STATS_BACKWARD: 1, FORWARD_BACKWARD: 2, FUSED: 1 if work.recipe.scope == "token" else 2}
    written = work.tokens if work.has_gradient else 0
    return {"floor_bytes": (reads[work.mode] * work.valid_tokens + written) * work.row_bytes}


def baselines(work: Work, rings: Sequence[Ring]) -> dict[str, Callable[[], object]]:
    """The best times of the machine with the same tensor: a read and a write, and a read."""
    (ring,) = rings
    return {"copy": lambda: ring.take().copy_(ring.take()), "sum": lambda: ring.take().sum()}
