"""Derivatives at kinks, by the program and by the autograd of the torch that is installed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import huber_loss, relu

import unirl_kernels as uk
from tests.runners import RUNNERS, Runner
from unirl_kernels.backends import COMPOSED
from unirl_kernels.program import evaluate, kinks, trace, weight_name

# Each is met by values of -1, -0.5, 0, 0.5 and 1, and by ties of x, y and z.
KINKS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "abs": lambda x, y, z: x.abs() * 3 + y,
    "clamp by numbers": lambda x, y, z: x.clamp(-0.5, 0.5) * y,
    "clamp by equal numbers": lambda x, y, z: x.clamp(0.5, 0.5) * y,
    "clamp by crossed numbers": lambda x, y, z: x.clamp(0.5, -0.5) * y,
    "clamp from below": lambda x, y, z: x.clamp(min=0.5) * y,
    "clamp from above": lambda x, y, z: x.clamp(max=0.5) * y,
    "clamp_min, clamp_max": lambda x, y, z: x.clamp_min(0) * y + y.clamp_max(0.5),
    "clamp by constant tensors": lambda x, y, z: torch.clip(x, torch.zeros_like(x), torch.ones_like(x)) * y,
    "clamp by a constant tensor": lambda x, y, z: torch.clip(x, min=torch.full_like(x, 0.5)) * y,
    "clamp by detached tensors": lambda x, y, z: x.clamp(y.detach(), z.detach()) * y,
    "clamp by tensors": lambda x, y, z: x.clamp(y, z),
    "clamp by a tensor from below": lambda x, y, z: x.clamp(min=y) * 3 + z,
    "clamp by a tensor from above": lambda x, y, z: x.clamp_max(2 * y) + x.clamp(max=z),
    "a 0-dim tensor and a number": lambda x, y, z: x.clamp(torch.tensor(0.5, dtype=x.dtype), 1.0) * y,
    "0-dim tensors": lambda x, y, z: x.clamp(*torch.tensor([-0.5, 0.5], dtype=x.dtype)) * y,
    "huber_loss": lambda x, y, z: huber_loss(x, y, reduction="none", delta=0.5),
    "logaddexp": lambda x, y, z: torch.logaddexp(x, 2 * y),
    "maximum": lambda x, y, z: torch.maximum(x, 2 * y) + torch.max(y, z),
    "minimum": lambda x, y, z: torch.minimum(torch.minimum(x, 2 * y), z),
    "relu": lambda x, y, z: relu(x) * 3 + y.relu(),
    "sign": lambda x, y, z: x.sign() * y,
    "sqrt": lambda x, y, z: torch.sqrt(x) + torch.sqrt(y.relu()) + z,
    "where": lambda x, y, z: torch.where(x > 0, x * x, y) + torch.where(x >= y, z, x),
}


def _points(dtype: torch.dtype) -> Tensor:
    """[3, 125]: every combination of five values."""
    return torch.tensor(list(itertools.product((-1.0, -0.5, 0.0, 0.5, 1.0), repeat=3)), dtype=dtype).T.contiguous()


@pytest.mark.parametrize("name", KINKS)
def test_programs_have_the_derivatives_of_autograd(name: str) -> None:
    stats = _points(torch.float64)
    x, y, z = (v.clone().requires_grad_() for v in stats)
    value = KINKS[name](x, y, z)
    gradients = torch.autograd.grad(value.sum(), (x, y, z), allow_unused=True, materialize_grads=True)
    traced = trace([lambda t: KINKS[name](t.logp, t.entropy, t.lse)])
    assert traced.fields == (weight_name(0),)
    fields = torch.ones(1, *x.shape, dtype=torch.float64)
    found = evaluate(traced.program, stats.unbind(), fields, torch.tensor(traced.params, dtype=torch.float64))
    for got, want in zip(found, (value.detach(), *gradients), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize(
    "objective",
    [lambda x, y, z: x.clamp(min=y) * z, lambda x, y, z: x.clamp(max=y) * z, lambda x, y, z: x.clamp(y, z)],
    ids=["from below", "from above", "on both sides"],
)
def test_bounds_may_be_infinite(objective: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """A bound that is not there is none of the same value."""
    inf = float("inf")
    stats = torch.tensor(list(itertools.product((-1.0, 0.5), (-inf, 0.0, inf), (0.5, 1.0))), dtype=torch.float64).T
    x, y, z = (v.clone().requires_grad_() for v in stats)
    value = objective(x, y, z)
    gradients = torch.autograd.grad(value.sum(), (x, y, z), allow_unused=True, materialize_grads=True)
    traced = trace([lambda t: objective(t.logp, t.entropy, t.lse)])
    fields, params = torch.ones(1, stats.shape[1]).double(), torch.tensor(traced.params, dtype=torch.float64)
    found = evaluate(traced.program, stats.unbind(), fields, params)
    for got, want in zip(found, (value.detach(), *gradients), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner.kernel != COMPOSED], ids=str)
def test_one_pass_is_composed_at_kinks(runner: Runner) -> None:
    """Fields stand at the kinks exactly, whatever rounding does to log-probabilities."""
    x, y, z = _points(torch.float32)[:, None, ::9]

    def objective(t: Any) -> Tensor:
        zero = t.logp - t.logp.detach()
        at = (t.x + zero, t.y + 2 * zero, t.z + 4 * zero)
        names = ("clamp by numbers", "clamp by tensors", "clamp by a tensor from below", "minimum", "relu")
        return sum(10.0**-i * KINKS[name](*at) for i, name in enumerate(names))

    n, device = x.shape[-1], runner.device
    fields = {"x": x.to(device), "y": y.to(device), "z": z.to(device)}
    batch = uk.Batch((torch.arange(n, device=device) % 8)[None], fields=fields)
    logits, gradients = torch.randn(1, n, 8, device=device), []
    for kernel in (runner.kernel, COMPOSED):
        leaf = logits.clone().requires_grad_()
        plan = uk.Plan(backend=runner.backend, kernel=kernel)
        uk.fused_loss(leaf, batch, uk.Loss(objective, uk.TokenMean()), plan=plan).loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_a_change_of_torch_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound the slope is what was asked, 1 before torch 2.14 and 0 since."""
    for slope in (0.0, 0.5, 1.0):
        monkeypatch.setattr(kinks, "KINKS", replace(kinks.KINKS, number=slope))
        traced = trace([lambda t: t.logp.clamp(-0.5, 0.5)])
        stats = torch.tensor([-0.5, 0.0, 0.5, 0.6], dtype=torch.float64)
        params = torch.tensor(traced.params, dtype=torch.float64)
        found = evaluate(traced.program, (stats,) * 3, torch.ones(1, 4, dtype=torch.float64), params)
        assert found[1].tolist() == [slope, 1.0, slope, 0.0]


def test_asking_starts_no_threads() -> None:
    """Autograd's engine is not run: forked processes would not be able to."""
    called = []
    x = torch.tensor(0.0, requires_grad=True)
    x.register_hook(called.append)
    assert kinks.slopes(lambda _: torch.abs(x), 0) == (0.0,)
    assert not called


@pytest.mark.filterwarnings("ignore:objective")
def test_a_number_and_a_token_are_no_bounds() -> None:
    with pytest.raises(uk.UnsupportedOperation, match="a number and a tensor"):
        trace([lambda t: t.logp.clamp(0.0, t.old_logp)])
    logits = torch.randn(1, 2, 4).requires_grad_()
    loss = uk.Loss(lambda t: t.logp.clamp(-1.0, t.entropy), uk.TokenMean())
    with pytest.raises(TypeError, match="combination of arguments"):
        uk.fused_loss(logits, uk.Batch(torch.tensor([[0, 1]])), loss, plan=uk.Plan(kernel="composed"))
