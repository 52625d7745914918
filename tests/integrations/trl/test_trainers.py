"""TRL's trainers train alike on their own loss head and on this package's: logs, samples and parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

from tests.integrations.trl.heads import FUSED, exact
from tests.integrations.trl.training import CASES, CLOCKS, PATCHED, RELATIVE, STEPS, Seen, differences
from unirl_kernels.integrations.trl import FusedHead, LogitFunctions, patch
from unirl_kernels.testing.budgets import error


def through(monkeypatch: pytest.MonkeyPatch, f: Callable[[Tensor], Tensor]) -> None:
    """Let the log-probabilities that this package gives to TRL pass through a function."""
    score, of_logits = FusedHead.score, LogitFunctions.selective_log_softmax_and_entropy

    def scored(*args: Any) -> Any:
        logp, *rest = score(*args)
        return f(logp), *rest

    @functools.wraps(of_logits)
    def selected(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        logp, entropy = of_logits(*args, **named)
        return f(logp), entropy

    monkeypatch.setattr(FusedHead, "score", scored)
    monkeypatch.setattr(LogitFunctions, "selective_log_softmax_and_entropy", selected)


@pytest.mark.parametrize("name", PATCHED)
def test_trains_as_with_its_own_head(
    name: str, run: Callable[..., Seen], own: Callable[[str], list[Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    through(monkeypatch, lambda logp: calls.append(logp) or logp)  # type: ignore[func-returns-value]
    got = run(name, patch)
    assert len(calls) >= 2 * STEPS  # of two microbatches
    assert differences(got, own(name)) == []
    expected = own(name)[0]
    steps = expected.logs[:-1]
    assert len(steps) == STEPS
    for key in ("loss", "grad_norm", *CASES[name].logged):
        assert any(log.get(key, 0.0) != 0 for log in steps), key
    moved = [key for key, value in expected.after.items() if not torch.equal(value, expected.before[key])]
    assert len(moved) == len(expected.after)


class _Times(torch.autograd.Function):
    """The identity, with a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * d_x, None


@pytest.mark.parametrize("name", PATCHED)
def test_wrong_gradient_would_show(
    name: str, run: Callable[..., Seen], own: Callable[[str], list[Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, lambda logp: _Times.apply(logp, 1.1))
    found = differences(run(name, patch), own(name))
    assert any(line.startswith("grad_norm of step 1") for line in found)
    assert any(line.startswith("parameter model.layers.0") for line in found)
    assert not any(line.startswith("loss of step 1") for line in found)


@pytest.mark.parametrize("name", PATCHED)
def test_slightly_wrong_gradient_would_show(
    name: str, run: Callable[..., Seen], own: Callable[[str], list[Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, lambda logp: _Times.apply(logp, 1.0001))
    found = differences(run(name, patch), own(name))
    assert any(line.startswith("grad_norm of step 1") for line in found)


SHOWN = {
    "grpo": "kl of step 2",
    "rloo": "kl of step 3",
    "dpo": "logps/chosen of step 1",
    "kto": "logps/rejected of step 1",
    "sft-dft": "loss of step 1",
}
"""Where it shows when log-probabilities are off."""


@pytest.mark.parametrize("name", SHOWN)
def test_slightly_wrong_log_probability_would_show(
    name: str, run: Callable[..., Seen], own: Callable[[str], list[Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, lambda logp: logp + 1e-4 * logp.detach())
    assert any(line.startswith(SHOWN[name]) for line in differences(run(name, patch), own(name)))


@pytest.mark.skipif(not FUSED, reason="trl before 1.15 rounds logits before its functions see them")
@pytest.mark.parametrize("name", ["dpo", "sft-dft", "sft-softcap"])
def test_is_nearer_to_the_truth_under_autocast(name: str, run: Callable[..., Seen]) -> None:
    """TRL rounds logits to bf16, this package does not; gradients pass a model in bf16 in either case."""
    truth, own, got = (run(name, head, bf16=True) for head in (exact, nullcontext, patch))

    def off(seen: Seen) -> list[str]:
        pairs = [(key, seen.logs[0][key], value) for key, value in truth.logs[0].items() if not key.endswith(CLOCKS)]
        return [key for key, a, b in pairs if key != "grad_norm" and not abs(a - b) <= RELATIVE * abs(b)]

    assert "entropy" in off(own) or "loss" in off(own)
    assert off(got) == []
    assert error(got.change, truth.change).relative <= 2 * error(own.change, truth.change).relative
