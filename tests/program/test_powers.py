"""Powers: value and derivative of a program are those of PyTorch's autograd, also where the base is 0 or infinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import unirl_kernels as uk
from tests.runners import Runner
from unirl_kernels.objectives import Focal
from unirl_kernels.program import evaluate, trace, weight_name

BASES = (0.0, 1.0, -1.0, -2.5, 3.0, math.inf, math.nan, -math.inf)
EXPONENTS = (0, 0.0, 1, 1.0, 2, 2.0, 3, -1, -1.0, -2, -3, -3.0, -8, 9, 0.5, -0.5, 1.5, torch.tensor(0.0))


class Tokens:
    def __init__(self, logp: torch.Tensor) -> None:
        self.logp = logp


def by_program(objective: Callable[[Any], Any], logp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    traced = trace([objective])
    ones = {weight_name(0): torch.ones_like(logp)}
    fields = torch.stack([ones[name] for name in traced.fields])
    params = torch.tensor(traced.params, dtype=torch.float64)
    loss, slope, _, _ = evaluate(traced.program, [logp, torch.ones_like(logp), torch.ones_like(logp)], fields, params)
    return loss, slope


@pytest.mark.parametrize("exponent", EXPONENTS, ids=repr)
def test_a_power_has_the_derivative_of_autograd(exponent: Any) -> None:
    # Of -inf, PyTorch computes these two by a square root, which is NaN, where C's pow is 0 or inf.
    bases = BASES[:-1] if exponent in (-0.5, 1.5) else BASES
    logp = torch.tensor(bases, dtype=torch.float64, requires_grad=True)
    loss, slope = by_program(lambda t: t.logp**exponent, logp.detach())
    expected = logp**exponent
    expected.sum().backward()
    torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
    torch.testing.assert_close(slope, logp.grad, equal_nan=True)


@pytest.mark.parametrize("gamma", [0, 0.0])
def test_focal_of_a_token_that_is_certain(runner: Runner, gamma: Any) -> None:
    logits = torch.full((1, 2, 5), -math.inf)
    logits[0, 0, 1] = 2.0
    logits[0, 1] = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    target = torch.tensor([[1, 2]], device=runner.device)

    def gradient(plan: uk.Plan) -> torch.Tensor:
        at = logits.to(runner.device).requires_grad_()
        uk.fused_loss(at, uk.Batch(target), uk.Loss(Focal(gamma)), plan=plan).loss.backward()
        assert at.grad is not None
        return at.grad

    torch.testing.assert_close(gradient(runner.plan()), gradient(uk.Plan(kernel="composed")))
