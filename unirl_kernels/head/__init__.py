"""Linear heads: statistics, loss and gradients of logits that exist in chunks only."""

from unirl_kernels.head.autograd import ComposedLinear, OnePassLinear
from unirl_kernels.head.chunks import Group, by_units
from unirl_kernels.head.composed import Composition
from unirl_kernels.head.sweep import Head

__all__ = ["ComposedLinear", "Composition", "Group", "Head", "OnePassLinear", "by_units"]
