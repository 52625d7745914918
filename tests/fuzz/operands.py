"""The logits of a case: given, or computed by a head, exactly and by plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.fuzz.inputs import Inputs
from tests.fuzz.yardstick import RUNS, row_dtype


def plain_logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """[T, V] logits in fp64, and [RUNS, T, V] in the rows' dtype: of a head each with other
    roundings of its sums, an ulp of what is added up."""
    dtype = row_dtype(inputs.case.dtype)
    if inputs.logits is not None:
        flat = inputs.logits.reshape(-1, inputs.case.vocab)
        return flat.double(), flat.to(dtype).expand(RUNS, -1, -1)
    hidden, weight, bias = flat_operands(inputs)
    exact = _product(hidden.double(), weight.double(), bias)
    once = _product(hidden.to(dtype), weight.to(dtype), bias)
    sizes = _product(hidden.to(dtype).abs(), weight.to(dtype).abs(), None if bias is None else bias.abs())
    steps = torch.randint(-1, 2, (RUNS, *once.shape), generator=torch.Generator().manual_seed(0))
    steps[0] = 0
    # With one nonzero hidden value nothing is added up.
    exactly = (hidden.count_nonzero(-1).unsqueeze(-1) <= 1) & (once.double() == exact)
    rounding = torch.where(sizes.isfinite() & ~exactly, sizes * torch.finfo(dtype).eps, 0)
    return exact, once + steps * rounding


def flat_operands(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [T, D], with zeros at ignored positions, weight and bias."""
    assert inputs.hidden is not None
    assert inputs.weight is not None
    hidden = inputs.hidden.reshape(-1, inputs.case.width)
    return torch.where(inputs.valid.unsqueeze(-1), hidden, 0), inputs.weight, inputs.bias


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ weight.t()
    return logits if bias is None else logits + bias.to(logits.dtype)
