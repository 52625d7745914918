"""Linear heads: statistics, loss and gradients from logits that are computed in chunks."""

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
