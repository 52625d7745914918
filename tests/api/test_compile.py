"""torch.compile(fullgraph=True): numbers and lengths that change compile nothing; losses made in the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk

V, D = 17, 6
TARGET = torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(0))
OLD, REF = torch.full((2, 5), -3.0), torch.full((2, 5), -3.2)
BATCH = uk.Batch(TARGET, torch.tensor([1.0, -0.5]), OLD, REF)
HEAD = torch.randn(V, D, generator=torch.Generator().manual_seed(1))


class Compiled:
    """A function compiled as one graph, and how often it was."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        torch.compiler.reset()
        self.graphs = 0
        self.function = torch.compile(function, fullgraph=True, backend=self._count)

    def _count(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


def value_and_gradient(function: Callable[..., Tensor], x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    value = function(leaf, *args)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@dataclass(frozen=True)
class Inner:
    factor: float = 2.0


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()


@cache
def follows_defaults() -> bool:
    """Whether a class can be called in a compiled function that has an object for a default, as objectives have."""
    try:
        Compiled(lambda x: x * Outer(Inner()).inner.factor).function(torch.ones(1))
    except torch._dynamo.exc.Unsupported as error:
        if "does not know how to wrap" in str(error):
            return False
        raise
    return True


@cache
def calculates() -> bool:
    """Whether a number that Python calculates with stays a variable: torch 2.11 compiles again for each one."""

    def graphs(factor: Callable[[float], float]) -> int:
        compiled = Compiled(lambda x, number: x * (torch.ones((), dtype=torch.float64) * factor(number)))
        for k in range(4):
            compiled.function(torch.ones(3), 0.3 + k / 7)
        return compiled.graphs

    return graphs(lambda number: -number) == graphs(lambda number: number)


def check_numbers(
    function: Callable[..., Tensor], x: Tensor, make: Callable[[float], Any] = float, variable: bool = True
) -> None:
    """The values of the plain function; the second number makes a variable of it, and those that follow compile
    nothing."""
    compiled = Compiled(function)
    for k in range(5):
        number = make(0.3 + k / 7)
        got, expected = (value_and_gradient(f, x, number) for f in (compiled.function, function))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    if variable:
        assert compiled.graphs == 2


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_temperature_that_changes(made: str) -> None:
    def inside(x: Tensor, temperature: float) -> Tensor:
        return outside(x, uk.Readout(temperature))

    def outside(x: Tensor, readout: uk.Readout) -> Tensor:
        return uk.token_stats(x, TARGET, readout=readout).logp.sum()

    x = torch.randn(2, 5, V)
    if made == "inside":
        check_numbers(inside, x)
    else:
        check_numbers(outside, x, uk.Readout)


def entropy(t: Any) -> Tensor:
    return -t.entropy


CALCULATED = ("closure", "sum")
"""Cases in which the user's Python code calculates with the number."""

FOLLOWS_NO_DEFAULTS = "torch.compile of this torch follows no class with an object for a default"

INSIDE: dict[str, Callable[[float], uk.Loss]] = {
    "recipe": lambda number: uk.grpo(beta=number),
    "closure": lambda number: uk.Loss(lambda t: -number * torch.exp(t.logp - t.old_logp) * t.advantage),
    "sum": lambda number: uk.sft() + number * uk.Loss(entropy, uk.TokenMean(10 * number)),
    "pairs": lambda number: uk.dpo(beta=number),
}


@pytest.mark.parametrize("name", INSIDE)
def test_loss_made_in_a_compiled_function(name: str) -> None:
    if name in ("recipe", "pairs") and not follows_defaults():
        pytest.skip(FOLLOWS_NO_DEFAULTS)
    make = INSIDE[name]
    variable = name not in CALCULATED or calculates()
    check_numbers(lambda x, n: uk.fused_loss(x, BATCH, make(n)).loss, torch.randn(2, 5, V), variable=variable)


def test_loss_made_in_a_compiled_function_with_a_linear_head() -> None:
    if not follows_defaults():
        pytest.skip(FOLLOWS_NO_DEFAULTS)

    def loss(hidden: Tensor, beta: float) -> Tensor:
        return uk.fused_linear_loss(hidden, HEAD, BATCH, uk.grpo(beta=beta), readout=uk.Readout(temperature=beta)).loss

    check_numbers(loss, 0.3 * torch.randn(2, 5, D))


def test_operation_that_kernels_do_not_run_is_named() -> None:
    def loss(x: Tensor) -> Tensor:
        return uk.fused_loss(x, BATCH, uk.Loss(lambda t: t.logp.cumsum(0))).loss

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"uses \.cumsum; one-pass kernels run"):
        Compiled(loss).function(torch.randn(2, 5, V))


@pytest.mark.parametrize("make", [uk.ppo, uk.dpo])
def test_overwritten_logits_of_any_length(make: Callable[[], uk.Loss]) -> None:
    loss, plan = make(), uk.Plan(overwrite_logits=True)

    def step(x: Tensor, target: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        return uk.fused_loss(x * 1.0, uk.Batch(target, advantage, old, old), loss, plan=plan).loss

    compiled = Compiled(step)
    for length in (5, 9, 11, 7):
        target, old = torch.randint(0, V, (2, length)), -3 * torch.rand(2, length)
        arguments = (torch.randn(2, length, V), target, old, torch.tensor([1.0, -1.0]))
        got, expected = (value_and_gradient(f, *arguments) for f in (compiled.function, step))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert compiled.graphs == 2


def test_packed_sequences_of_one_token() -> None:
    """Compiled code cannot see whether sequences are empty, so ``sequence_fields`` has to say what a field is."""
    x, target = torch.randn(5, V), torch.arange(5)
    advantage = torch.linspace(-1, 1, 5)

    def loss(x: Tensor, ends: Tensor, names: Any) -> Tensor:
        batch = uk.Batch(target, advantage, cu_seqlens=ends, sequence_fields=names)
        return uk.fused_loss(x, batch, uk.rft()).loss

    for ends, names in ((torch.arange(6), []), (torch.tensor([0, 2, 2, 2, 4, 5]), ["advantage"])):
        expected = value_and_gradient(loss, x, ends, names)
        got = value_and_gradient(Compiled(lambda x, ends, names=names: loss(x, ends, names)).function, x, ends)
        torch.testing.assert_close(got, expected)
    with pytest.raises(Exception, match=r"advantage is ambiguous: .* in compiled code; name"):
        Compiled(lambda x, ends: loss(x, ends, None)).function(x, torch.arange(6))
