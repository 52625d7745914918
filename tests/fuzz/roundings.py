"""Another rounding of every operation: what plain PyTorch might as well have computed.

A run whose roundings happen to cancel says nothing about the next one, nor about a comparison of two numbers that
are as far apart as they are rounded. So each result of arithmetic that is not exact is moved by an ulp up or down, or
stays (Monte Carlo arithmetic: Parker, Pierce and Eggert 2000). Equal results move alike, so that ties remain ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten

SUMS = frozenset({aten.sum, aten.mean})
"""Of which the order of additions is not known: an ulp of all that is added."""

ARITHMETIC = SUMS | {
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.reciprocal, aten.lerp, aten.pow, aten.sqrt, aten.rsqrt),
    *(aten.exp, aten.expm1, aten.log, aten.log1p, aten.logaddexp, aten.softplus, aten.tanh, aten.sigmoid),
    *(aten.huber_loss, aten.softplus_backward, aten.tanh_backward, aten.sigmoid_backward),
    *(aten.log_sigmoid_forward, aten.log_sigmoid_backward, aten.huber_loss_backward),
}


class OtherRoundings(TorchDispatchMode):
    """Arithmetic on tensors whose first dimension is n runs, each rounded in its own way.

    Args:
        runs: n.
    """

    def __init__(self, runs: int) -> None:
        super().__init__()
        self._runs = runs

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        found = func(*args, **kwargs)
        if func.overloadpacket not in ARITHMETIC:
            return found
        result = found[0] if isinstance(found, tuple) else found
        if not (result.is_floating_point() and result.dim() and len(result) == self._runs):
            return found
        moved = self._moved(result, func, args, kwargs)
        return (moved, *found[1:]) if isinstance(found, tuple) else moved

    def _moved(self, x: Tensor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        size = x
        if func.overloadpacket in SUMS:
            size = func(args[0].abs(), *args[1:], **kwargs)
        moved = x + size * (torch.finfo(x.dtype).eps * self._steps(x))
        return torch.where(_is_exact(x, func, args, kwargs) | ~x.isfinite(), x, moved)

    def _steps(self, x: Tensor) -> Tensor:
        """-1, 0 or 1, by the bits of a result and its run."""
        bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int64).long()
        run = torch.arange(1, self._runs + 1).view(-1, *[1] * (x.dim() - 1))
        mixed = (bits ^ (run * 0x9E3779B97F4A7C1)) * 0x2545F4914F6CDD1D
        return (mixed >> 33) % 3 - 1


def _is_exact(x: Tensor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Where nothing was rounded: in fp32 by the same operation in fp64; in fp64 where fp32 could hold the result."""
    if x.dtype == torch.float64:
        return x == x.float().double()
    wide = func(*(tree_map_only(Tensor, _wide, list(args))), **kwargs)
    return x.double() == (wide[0] if isinstance(wide, tuple) else wide)


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
