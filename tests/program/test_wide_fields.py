"""Fields that are wider than the rows: a program in fp32 gives what PyTorch gives, rounded to fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import unirl_kernels as uk
from tests.fuzz.expressions import Written, written
from tests.runners import Runner
from unirl_kernels.program import evaluate, trace, weight_name

SEEDS = 600
SHAPE = (512,)


class RangeOfFp32(TorchDispatchMode):
    """fp64 in which what fp32 does not hold is infinite: what kernels make of it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            beyond = value.abs() > torch.finfo(torch.float32).max
            value = torch.where(beyond, value.sign() * math.inf, value)
        return value


class Tokens:
    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.__dict__.update(values)


def tokens(seed: int) -> dict[str, Tensor]:
    """Statistics, and fields as an objective sees them. Infinities and NaN in fields of floating dtypes."""
    made = torch.Generator().manual_seed(seed)

    def normal(dtype: torch.dtype, special: bool = True) -> Tensor:
        value = torch.randn(SHAPE, generator=made, dtype=torch.float64)
        kinds = torch.randint(0, 12, SHAPE, generator=made) if special else torch.full(SHAPE, 11)
        for kind, number in enumerate((math.inf, -math.inf, math.nan)):
            value[kinds == kind] = number
        return value.to(dtype)

    numbers = {name: normal(torch.float32, False) for name in ("logp", "entropy", "lse")}
    numbers |= {name: normal(torch.float32) for name in ("old_logp", "ref_logp", "advantage")}
    numbers |= {"half": normal(torch.float32), "brain": normal(torch.float32), "precise": normal(torch.float64)}
    integers = {name: torch.randint(0, 5, SHAPE, generator=made) for name in ("count", "byte", "short", "per_sequence")}
    return numbers | integers | {"flag": torch.rand(SHAPE, generator=made) < 0.5}


def by_program(objective: Callable[[Any], Any], values: Mapping[str, Tensor]) -> Tensor:
    """The loss of each token, in fp32."""
    traced = trace([objective])
    weight = {weight_name(0): torch.ones(SHAPE)}
    read = [(values | weight)[name].to(torch.float32) for name in traced.fields]
    wide = [name for name, x in values.items() if x.dtype == torch.float64]
    params = torch.tensor(traced.params_of(torch.float32, wide), dtype=torch.float64)
    stats = [values[name] for name in ("logp", "entropy", "lse")]
    return evaluate(traced.program, stats, torch.stack(read) if read else torch.empty(0, *SHAPE), params)[0]


def kind(x: Tensor) -> Tensor:
    """-1, 0 and 1 of what is finite or infinite, 2 of NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0))


LIMITS = (
    "torch.nan_to_num({f})",
    "torch.nan_to_num({f}, nan=1.0)",
    "({f}).nan_to_num(posinf=2.0)",
    "torch.nan_to_num({f}.double())",
    "torch.nan_to_num({f}.to(torch.float32))",
    "torch.nan_to_num({f}.type_as(t.precise))",
    "torch.nan_to_num({f} + t.precise)",
    "torch.nan_to_num(torch.where(t.flag, t.precise, {f}).float())",
)
"""Around the expressions of the fuzzer, which do not ask for the limits of a dtype."""


@pytest.mark.parametrize("limit", LIMITS)
def test_programs_give_what_pytorch_gives(limit: str) -> None:
    differ = []
    for seed in range(SEEDS // len(LIMITS)):
        *lines, last = written(Random(seed)).source.splitlines()
        value = limit.format(f=f"({last.removeprefix('return ')})")
        objective = Written("\n".join([*lines, f"return {value}"]))
        values = tokens(seed)
        with RangeOfFp32():
            expected = objective(Tokens(values)).to(torch.float32)
        if not torch.equal(kind(by_program(objective, values)), kind(expected.expand(SHAPE))):
            differ.append(objective.source)
    assert not differ


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
@pytest.mark.parametrize("gradient", [False, True])
def test_limits_are_those_of_the_field(infinity: float, gradient: bool, runner: Runner) -> None:
    """fp64's largest number is infinite in fp32, fp32's is not."""
    batch_of = {
        torch.float32: math.copysign(torch.finfo(torch.float32).max, infinity) * 0.5,
        torch.float64: infinity,
    }
    for dtype, expected in batch_of.items():
        field = torch.tensor([[infinity]], dtype=dtype, device=runner.device)
        batch = uk.Batch(torch.tensor([[1]], device=runner.device), fields={"field": field})
        logits = torch.zeros(1, 1, 2, device=runner.device, requires_grad=gradient)
        loss = uk.Loss(lambda t: 0.5 * torch.nan_to_num(t.field) + 0 * t.logp, uk.TokenMean())
        assert uk.fused_loss(logits, batch, loss, plan=runner.plan()).loss.item() == expected, dtype
        narrow = uk.Loss(lambda t: 0.5 * torch.nan_to_num(t.field.float()) + 0 * t.logp, uk.TokenMean())
        assert uk.fused_loss(logits, batch, narrow, plan=runner.plan()).loss.item() == batch_of[torch.float32], dtype


@pytest.mark.parametrize("made", [torch.zeros_like, lambda x: 1 - torch.ones_like(x)], ids=["zeros_like", "ones_like"])
def test_an_infinity_times_a_made_zero_is_not_simplified(made: Callable[[Any], Any]) -> None:
    """It is NaN, as in PyTorch."""
    values = tokens(0) | {"advantage": torch.full(SHAPE, math.inf)}
    assert by_program(lambda t: t.advantage * made(t.logp) + t.logp, values).isnan().all()
