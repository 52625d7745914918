"""What a row of the table is, and the aggregations of its oracle, written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import unirl_kernels as uk
from tests.objectives.variants.data import RAGGED, WHOLE, Answer, Oracle

OfTokens = Callable[[Answer], Tensor]
"""The loss of each token of a sequence, [n]; or, for ``of_sequences``, that of the sequence."""


@dataclass(frozen=True)
class Row:
    """One published objective or aggregation.

    Args:
        number: of the table.
        name: what it is called there.
        loss: how it is written here.
        oracle: its value, by its formula.
        fields: names of the fields that it reads, with spaces between them; ``name:source`` where another holds them.
        empty: whether it is defined for a sequence without tokens.
        interleaved: whether chosen and rejected sequences alternate in the batch; else the chosen ones come first.
    """

    number: int
    name: str
    loss: Callable[[], uk.Loss]
    oracle: Oracle
    fields: str = ""
    empty: bool = True
    interleaved: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return RAGGED if self.empty else WHOLE

    def __str__(self) -> str:
        return f"{self.number}-{self.name}"


def token_sum(f: OfTokens) -> Oracle:
    return lambda answers: sum(f(o).sum() for o in answers)


def token_mean(f: OfTokens) -> Oracle:
    return lambda answers: sum(f(o).sum() for o in answers) / sum(len(o) for o in answers)


def mean_of_means(f: OfTokens) -> Oracle:
    """Every sequence counts, one without tokens adds 0."""
    return lambda answers: sum(f(o).sum() / len(o) for o in answers if len(o)) / len(answers)


def sum_of_means(f: OfTokens) -> Oracle:
    return lambda answers: sum(f(o).sum() / len(o) for o in answers if len(o))


def mean_of_sums(f: OfTokens, length: float = 1) -> Oracle:
    return lambda answers: sum(f(o).sum() for o in answers) / (length * len(answers))


def of_sequences(f: OfTokens) -> Oracle:
    """Mean over sequences of one number each; one without tokens has none."""
    return lambda answers: sum(f(o) for o in answers if len(o)) / len(answers)


def of_pairs(f: Callable[[Answer, Answer], Tensor], interleaved: bool = False) -> Oracle:
    def value(answers: list[Answer]) -> Tensor:
        half = len(answers) // 2
        chosen, rejected = (answers[::2], answers[1::2]) if interleaved else (answers[:half], answers[half:])
        return sum(f(a, b) for a, b in zip(chosen, rejected, strict=True)) / half

    return value


def of_groups(f: Callable[[list[Answer]], Tensor]) -> Oracle:
    """Mean over groups."""

    def value(answers: list[Answer]) -> Tensor:
        names = sorted({int(o.group) for o in answers})
        return sum(f([o for o in answers if o.group == name]) for name in names) / len(names)

    return value


def plus(*terms: tuple[float, Oracle]) -> Oracle:
    return lambda answers: sum(c * f(answers) for c, f in terms)


def sg(x: Tensor) -> Tensor:
    """Stop gradient."""
    return x.detach()


def r(o: Answer) -> Tensor:
    """pi / pi_old."""
    return torch.exp(o.logp - o.old_logp)


def ppo(ratio: Tensor, advantage: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    return -torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)


def k3(o: Answer, other: str = "ref_logp") -> Tensor:
    d = getattr(o, other) - o.logp
    return torch.exp(d) - d - 1
