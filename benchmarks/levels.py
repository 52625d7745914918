"""The two levels of the bench, logits and linear heads, with everything that depends on the level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.buffers import Ring
from benchmarks.columns import Columns
from benchmarks.inputs import Inputs
from benchmarks.linear import columns as linear_columns
from benchmarks.linear import floor as linear_floor
from benchmarks.linear import inputs as linear_inputs
from benchmarks.linear import kernels as linear_kernels
from benchmarks.linear import peers as linear_peers
from benchmarks.linear import truth as linear_truth
from benchmarks.logits import columns, floor, inputs, kernels, peers, truth
from benchmarks.providers import Provider
from benchmarks.truth import Truth
from benchmarks.work import Work


@dataclass(frozen=True)
class Level:
    """A level.

    Args:
        make: the operands, and the batch around them.
        ours: this package's kernels.
        peers: other libraries' implementations.
        truth: the fp64 results to compare with.
        floor: the least work of any provider, as ``Run`` records it.
        baselines: calls that measure what the machine does at best, by their names in ``Run``.
        columns: the table.
    """

    make: Callable[[Work], Inputs]
    ours: Callable[[Work], Iterable[Provider]]
    peers: Sequence[Provider]
    truth: Callable[[Inputs], Truth]
    floor: Callable[[Work], Mapping[str, int]]
    baselines: Callable[[Work, Sequence[Ring]], Mapping[str, Callable[[], object]]]
    columns: Columns


LOGITS = Level(
    inputs.make,
    kernels.ours,
    peers.PEERS,
    truth.LogitsTruth,
    floor.floor,
    floor.baselines,
    columns.COLUMNS,
)
LINEAR = Level(
    linear_inputs.make,
    linear_kernels.ours,
    linear_peers.PEERS,
    linear_truth.LinearTruth,
    linear_floor.floor,
    linear_floor.baselines,
    linear_columns.COLUMNS,
)


def level_of(work: Work) -> Level:
    return LOGITS if work.hidden is None else LINEAR
