"""How the rows of a chunk of logits are measured: whole ones by a kernel, split ones by a kernel and their group."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from unirl_kernels.backends import Measured, ReadoutArgs, RowObservations, load
from unirl_kernels.head.sweep import AtOnce, Summed
from unirl_kernels.operators.shards import ShardArgs, merged, moments_of_tiles


@dataclass(frozen=True)
class Rows:
    """The rows of a chunk.

    Args:
        backend: whose kernels work on them.
        shard: which columns this rank has; None: all.
        sums: whether the gradient of the hidden states is summed over the ranks.
    """

    backend: str
    shard: ShardArgs | None = None
    sums: bool = False

    def vocab(self, columns: int) -> int:
        """Columns of the whole rows, of which this rank has so many."""
        return columns if self.shard is None else self.shard.vocab

    def target(self, target: Tensor) -> Tensor:
        """Targets as kernels take them."""
        return target if self.shard is None else self.shard.target(target)

    def measure(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured:
        """Statistics and moments of whole rows, from this rank's columns, [1, n, columns]."""
        token_stats = load(self.backend).token_stats
        if self.shard is None:
            return token_stats(logits, target, readout)
        part = moments_of_tiles(token_stats, logits, self.target(target), readout, self.shard.tiles)
        stats, moments, _ = merged(part, target, readout, self.shard)
        return Measured(stats, moments)

    def of_hidden(self) -> AtOnce:
        """What becomes of the gradient of the hidden states."""
        return Summed(self.shard.ranks) if self.shard is not None and self.sums else AtOnce()


@dataclass(frozen=True)
class ObservedRows(Rows):
    """Whole rows, of which is kept what else is observed.

    Args:
        found: of each call of ``measure``, [1, n].
    """

    found: list[RowObservations] = field(default_factory=list)

    def measure(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured:
        stats, moments, observations = load(self.backend).token_observations(logits, target, readout)
        self.found.append(observations)
        return Measured(stats, moments)
