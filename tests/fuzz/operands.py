"""What logits a case has: as given, or as a head makes them, exactly and by plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.fuzz.inputs import Inputs
from tests.fuzz.yardstick import RUNS, row_dtype


def plain_logits(inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """[T, V] logits in fp64, and ``RUNS`` times in the rows' dtype: a head's sums are taken in another order each."""
    dtype = row_dtype(inputs.case.dtype)
    if inputs.logits is not None:
        flat = inputs.logits.reshape(-1, inputs.case.vocab)
        return flat.double(), [flat.to(dtype)] * RUNS
    hidden, weight, bias = flat_operands(inputs)
    exact = _product(hidden.double(), weight.double(), bias)
    plain = []
    for k in range(RUNS):
        order = torch.randperm(hidden.shape[-1], generator=torch.Generator().manual_seed(k))
        plain.append(_product(hidden.to(dtype)[:, order], weight.to(dtype)[:, order], bias))
    return exact, plain


def flat_operands(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [T, D], with zeros at ignored positions, weight and bias."""
    assert inputs.hidden is not None and inputs.weight is not None
    hidden = inputs.hidden.reshape(-1, inputs.case.width)
    return torch.where(inputs.valid.unsqueeze(-1), hidden, 0), inputs.weight, inputs.bias


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ weight.t()
    return logits if bias is None else logits + bias.to(logits.dtype)
