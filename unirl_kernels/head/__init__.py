"""Linear heads: statistics, loss and gradients of logits that exist in chunks only."""

from unirl_kernels.head import implementations
from unirl_kernels.head.chunks import Group, by_units
from unirl_kernels.head.composed import ComposedLinear, Composition
from unirl_kernels.head.sweep import Head

__all__ = ["ComposedLinear", "Composition", "Group", "Head", "by_units", "implementations"]
