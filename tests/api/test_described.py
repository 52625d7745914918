"""Arguments as text, by which ranks compare them: different coefficients, different texts."""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import unirl_kernels as uk
from unirl_kernels.api.described import compared_lines

FACTOR = 1.0


class Mode(enum.Enum):
    UP = 1
    DOWN = 2


class Slotted:
    __slots__ = ("factor",)
    scope = "sequence"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, t: Any) -> Any:
        return self.factor * t.logp


class Holds:
    scope = "sequence"

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, t: Any) -> Any:
        return t.logp


def scaled(t: Any, factor: float) -> Any:
    return factor * t.logp


class Partial(partial):  # type: ignore[type-arg]
    scope = "sequence"


def with_keyword(k: float) -> Any:
    def objective(t: Any, *, factor: float = k) -> Any:
        return factor * t.logp

    return Holds(objective)


def of_module(k: float) -> Any:
    scope: dict[str, Any] = {"FACTOR": k}
    exec("def objective(t):\n    return FACTOR * t.logp", scope)
    return Holds(scope["objective"])


def of_code(k: float) -> Any:
    scope: dict[str, Any] = {}
    exec(f"def objective(t):\n    a, b = ({k}, 2.0)\n    return a * t.logp if t.kind in {{{k}, 7}} else b", scope)
    return Holds(scope["objective"])


class Private:
    scope = "sequence"

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def __call__(self, t: Any) -> Any:
        return self._factor * t.logp


class Module(torch.nn.Module):
    scope = "sequence"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, t: Any) -> Any:
        return self.factor * t.logp


MAKERS: dict[str, Callable[[float], Any]] = {
    "slots": Slotted,
    "partial": lambda k: Partial(scaled, factor=k),
    "keyword-only default": with_keyword,
    "global": of_module,
    "constants of code": of_code,
    "enum": lambda k: Holds(Mode.UP if k == 1 else Mode.DOWN),
    "set": lambda k: Holds({k, 3.0, 4.0}),
    "numpy number": lambda k: Holds(np.float32(k)),
    "numpy array": lambda k: Holds(np.array([k, 2.0])),
    "complex": lambda k: Holds(complex(0, k)),
    "tensor": lambda k: Holds(torch.tensor([k])),
    "private number": Private,
    "module": Module,
    "bound method": lambda k: Holds(Private(k).__call__),
    "nested": lambda k: Holds([{"a": (k,)}]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_number_shows_wherever_it_is_kept(name: str) -> None:
    make = MAKERS[name]

    def text(k: float) -> list[str]:
        return compared_lines(uk.Loss(make(k)), values=True)

    assert text(1.0) == text(1.0)
    assert text(1.0) != text(5.0)


def nested(k: float) -> Any:
    scope: dict[str, Any] = {"FACTOR": k}
    exec("def objective(t):\n    return (lambda x: FACTOR * x)(t.logp)", scope)
    return Holds(scope["objective"])


class Child(torch.nn.Module):
    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("b", torch.tensor(1.0), persistent=False)


def with_child(k: float) -> Any:
    module = Module(1.0)
    module.child = Child(k)
    return module


def with_buffer(k: float) -> Any:
    module = with_child(1.0)
    module.child.b.fill_(k)
    return module


@pytest.mark.parametrize("make", [nested, with_child, with_buffer])
def test_a_number_inside_shows(make: Callable[[float], Any]) -> None:
    one, same, other = (compared_lines(uk.Loss(make(k)), values=True) for k in (1.0, 1.0, 5.0))
    assert one == same != other


def of_rank(rank: int) -> Any:
    """What ranks may differ in."""
    scope: dict[str, Any] = {"rank": rank, "DEVICE": f"cuda:{rank}", "torch": torch}
    exec("def objective(t):\n    return t.rank * t.logp * torch.ones(1, device=DEVICE)", scope)
    held = Holds([scope["objective"], torch, np, np.exp, np.dtype("float32"), np.array([1.0, 2.0])[::-1]])
    held._rank, held._device, held.objects = rank, f"cuda:{rank}", {object(), object()}
    held.mode = Identity.OF
    return held


class Identity(enum.Enum):
    OF = object()


def test_ranks_may_differ_in_devices_and_objects() -> None:
    assert compared_lines(uk.Loss(of_rank(0)), True) == compared_lines(uk.Loss(of_rank(1)), True)


def test_named_fields_are_compared() -> None:
    target, x = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2)
    texts = [compared_lines(uk.Batch(target, x, sequence_fields=names), True) for names in (None, ["advantage"])]
    assert texts[0] != texts[1]
