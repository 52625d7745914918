"""Linear heads: statistics, loss and gradients of logits that exist in chunks only."""

from unirl_kernels.head import implementations
from unirl_kernels.head.chunks import by_units, rows_per_chunk
from unirl_kernels.head.composed import ComposedLinear, Composition
from unirl_kernels.head.sweep import Head

__all__ = [
    "ComposedLinear",
    "Composition",
    "Head",
    "by_units",
    "implementations",
    "rows_per_chunk",
]
