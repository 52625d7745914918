"""How the rows of a chunk of logits are measured: whole ones by a kernel, split ones by a kernel and their group."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from unirl_kernels.backends import Measured, ReadoutArgs, RowGradients, RowMoments, RowObservations, load
from unirl_kernels.head.sweep import AtOnce, Summed
from unirl_kernels.operators.rows import check_targets
from unirl_kernels.operators.shards import ShardArgs, merged, moments_of_tiles


@dataclass(frozen=True)
class WholeRows:
    """Rows of the whole vocabulary.

    Args:
        backend: whose kernels work on them.
    """

    backend: str

    def check_targets(self, target: Tensor, columns: int) -> None:
        check_targets(target, columns)

    def measure(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured:
        """Statistics and moments of rows, [1, n, columns]."""
        return load(self.backend).token_stats(logits, target, readout)

    def write_gradient(
        self,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        moments: RowMoments,
        gradients: RowGradients,
        d_logits: Tensor,
    ) -> None:
        load(self.backend).token_stats_backward(logits, target, readout, moments, gradients, d_logits)

    def of_hidden(self) -> AtOnce:
        """What becomes of the gradient of the hidden states."""
        return AtOnce()


@dataclass(frozen=True)
class ObservedRows(WholeRows):
    """Whole rows, of which is kept what else is observed.

    Args:
        found: of each call of ``measure``, [1, n].
    """

    found: list[RowObservations] = field(default_factory=list)

    def measure(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured:
        stats, moments, observations = load(self.backend).token_observations(logits, target, readout)
        self.found.append(observations)
        return Measured(stats, moments)


@dataclass(frozen=True)
class SplitRows(WholeRows):
    """Rows of which this rank has a shard.

    Args:
        shard: which.
        sums: whether the gradient of the hidden states is summed over the ranks.
    """

    shard: ShardArgs
    sums: bool

    def check_targets(self, target: Tensor, columns: int) -> None:
        check_targets(target, self.shard.vocab)

    def measure(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured:
        at, tiles = self.shard.target(target), self.shard.tiles
        part = moments_of_tiles(load(self.backend).token_stats, logits, at, readout, tiles)
        stats, moments, _ = merged(part, target, readout, self.shard)
        return Measured(stats, moments)

    def write_gradient(
        self,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        moments: RowMoments,
        gradients: RowGradients,
        d_logits: Tensor,
    ) -> None:
        if self.shard.columns:
            super().write_gradient(logits, self.shard.target(target), readout, moments, gradients, d_logits)

    def of_hidden(self) -> AtOnce:
        return Summed(self.shard.ranks) if self.sums else AtOnce()
