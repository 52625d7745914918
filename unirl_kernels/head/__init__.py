"""Linear heads: statistics, loss and gradients of logits that exist in chunks only."""

from unirl_kernels.head import implementations
from unirl_kernels.head.chunks import Group, by_units, rows_per_chunk
from unirl_kernels.head.composed import ComposedLinear, Composition, observations
from unirl_kernels.head.rows import ObservedRows, Rows
from unirl_kernels.head.sweep import Head

__all__ = [
    "ComposedLinear",
    "Composition",
    "Group",
    "Head",
    "ObservedRows",
    "Rows",
    "by_units",
    "implementations",
    "observations",
    "rows_per_chunk",
]
