"""verl's heads without logits, in PyTorch and in Triton, and this package's: values, gradients and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.verl.modules import DTYPES, SHAPES, D, V, Verl, check, triton_kernels, verl
from unirl_kernels.integrations import verl as ours
from unirl_kernels.testing.budgets import condition_of, violations

__all__ = ["triton_kernels", "verl"]

TEMPERATURES = {
    "unit": lambda shape: 1.0,
    "number": lambda shape: 0.7,
    "tensor": lambda shape: torch.tensor(1.3),
    "per_token": lambda shape: 0.5 + torch.rand(shape),
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SHAPES[request.param]


def operands(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, width: int = D
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(*shape, width).to(dtype), torch.randn(V, width).to(dtype), torch.randint(0, V, shape)


def on_logits(verl: Verl, labels: Tensor, temperature: float | Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """verl's functions on whole logits: the same in any precision, and with any temperature."""

    def of(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        divisor = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
        logits = hidden @ weight.t() / divisor
        return verl.logits.logprobs_from_logits_naive(logits, labels), verl.logits.entropy_from_logits(logits)

    return of


def flat(function: Callable[..., tuple[Tensor, Tensor]], reduction: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """With results as ``linear_cross_entropy`` lays them out."""

    def of(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy = (x.reshape(-1) for x in function(*leaves))
        return {"none": logp, "sum": logp.sum(), "mean": logp.mean()}[reduction], entropy

    return of


def lse_of(hidden: Tensor, weight: Tensor, temperature: float | Tensor) -> float:
    """What rounding of logits is relative to: the largest |log sum exp|."""
    divisor = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    return torch.logsumexp(hidden.double() @ weight.double().t() / divisor, -1).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("impl_backend", ["torch", "liger"])
def test_fused_linear_for_ppo(
    verl: Verl, impl_backend: str, temperature: float, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    hidden, weight, labels = operands(shape, dtype)

    def of(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        head = module.FusedLinearForPPO(chunk_size=4, impl_backend=impl_backend)
        return lambda h, w: head.forward(hidden_states=h, vocab_weights=w, input_ids=labels, temperature=temperature)

    exact = on_logits(verl, labels, temperature)
    check(of(ours), of(verl.hidden), [hidden, weight], exact, lse_of(hidden, weight, temperature))


def test_fused_linear_for_ppo_takes_what_theirs_cannot(verl: Verl, shape: tuple[int, ...]) -> None:
    """A temperature per token."""
    hidden, weight, labels = operands(shape)
    temperature = 0.5 + torch.rand(shape)
    wanted = on_logits(verl, labels, temperature)
    head = ours.FusedLinearForPPO()
    size = lse_of(hidden, weight, temperature)
    check(lambda h, w: head(h, w, labels.int(), temperature), wanted, [hidden, weight], size=size)


def test_fused_linear_for_ppo_refuses(verl: Verl) -> None:
    for module in (verl.hidden, ours):
        with pytest.raises(ValueError, match="triton"):
            module.FusedLinearForPPO(impl_backend="triton")


@pytest.mark.parametrize("head", ["FusedLinearForPPO", "linear_cross_entropy"])
def test_autocast(verl: Verl, head: str) -> None:
    """verl's engines run models under it. It rounds the product's operands, and nothing else."""
    hidden, weight, labels = operands((11,))
    function = ours.FusedLinearForPPO() if head == "FusedLinearForPPO" else ours.linear_cross_entropy
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = function(hidden, weight, labels, 0.7)
    rounded = hidden.bfloat16(), weight.bfloat16()
    wanted, size = on_logits(verl, labels, 0.7), lse_of(*rounded, 0.7)
    plain, truth = wanted(*(x.float() for x in rounded)), wanted(*(x.double() for x in rounded))
    for x, p, t in zip(got, plain, truth, strict=True):
        assert not violations(x, p, t, condition=condition_of(t, size))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_linear_cross_entropy(verl: Verl, shape: tuple[int, ...], temperature: str, reduction: str) -> None:
    hidden, weight, labels = operands(shape)
    divisor = TEMPERATURES[temperature](shape)
    wanted = flat(on_logits(verl, labels, divisor), reduction)
    size = lse_of(hidden, weight, divisor)
    check(
        lambda h, w: ours.linear_cross_entropy(h, w, labels, divisor, reduction.upper(), None),
        wanted,
        [hidden, weight],
        size=size,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy_of_16_bits(verl: Verl, dtype: torch.dtype) -> None:
    hidden, weight, labels = operands((11,), dtype)
    wanted = on_logits(verl, labels, 0.7)
    check(
        lambda h, w: ours.linear_cross_entropy(h, w, labels, 0.7),
        wanted,
        [hidden, weight],
        size=lse_of(hidden, weight, 0.7),
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # verl divides by zero in rows that it does not store
@pytest.mark.parametrize(
    ("reduction", "shape"), [("none", (11,)), ("none", (1, 11)), ("none", (3, 5)), ("sum", (16,)), ("mean", (2, 8))]
)
def test_kernels_of_verl(verl: Verl, triton_kernels: None, reduction: str, shape: tuple[int, ...]) -> None:
    """verl's Triton kernels set the budget. They take widths of 128; their sums, lengths that are multiples of 16."""
    hidden, weight, labels = operands(shape, width=128)
    theirs, temperature = verl.kernel.linear_cross_entropy, 2.3
    exact = flat(on_logits(verl, labels, temperature), reduction)
    check(
        lambda h, w: ours.linear_cross_entropy(h, w, labels, temperature, reduction),
        lambda h, w: theirs(h, w, labels, temperature, reduction),
        [hidden, weight],
        exact,
        lse_of(hidden, weight, temperature),
    )


def test_linear_cross_entropy_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = operands((5,))
    with pytest.raises(ValueError, match="reduction must be one of none, sum, mean, got 'median'"):
        ours.linear_cross_entropy(*arguments, reduction="median")
    group = object()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda given: 1 if given is group else 0)
    got = ours.linear_cross_entropy(*arguments, 1.0, "none", group)
    assert torch.equal(got[0], ours.linear_cross_entropy(*arguments)[0])
