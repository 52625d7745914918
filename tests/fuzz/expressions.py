"""Random objectives of token scope, written as Python: what users write, and what is printed of a failing case."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from types import CodeType
from typing import Any

import torch
from torch import Tensor

NUMBERS = (
    *("-{f}", "{f}.neg()", "{f}.abs()", "abs({f})", "(1 - {f})", "(2 * {f})", "({f} / 3)", "({f} + 0.25)"),
    *("({f} + {f})", "({f} - {f})", "({f} * {f})", "({f} - {f}) * {f}", "torch.add({f}, {f})", "torch.sub({f}, {f})"),
    *("({f} / ({f}.abs() + 0.5))", "torch.div({f}, {f}.square() + 1)", "(0.5 / ({f}.abs() + 1))"),
    *("torch.exp({f}.clamp(-6, 6))", "torch.exp(({f} - {f}).clamp(-5, 5))", "(0.1 * {f}).clamp(max=8).exp()"),
    *("torch.expm1(({f}).clamp(-4, 3))", "torch.log({f}.abs() + 0.1)", "torch.log1p(torch.relu({f}))"),
    *("torch.sqrt({f}.square() + 0.01)", "torch.rsqrt({f} ** 2 + 1)", "torch.reciprocal({f}.abs() + 0.5)"),
    *("torch.tanh({f})", "torch.sigmoid({f})", "{f}.sigmoid()", "logsigmoid({f})", "softplus({f})"),
    *("{f}.square()", "({f}) ** 2", "({f}.clamp(-9, 9)) ** 3", "({f}.abs() + 0.5) ** -1", "({f}.abs() + 0.5) ** 1.5"),
    *("torch.relu({f})", "relu({f})", "{f}.relu()", "torch.sign({f})", "{f}.detach()", "torch.pow({f}, 2)"),
    *("torch.zeros_like({f})", "torch.ones_like({f})", "torch.full_like({f}, 0.75)", "{f}.double().to(t.logp.dtype)"),
    *("{f}.clamp(min=-1)", "{f}.clamp(0.8, 1.2)", "torch.clamp({f}, max=0.5)", "{f}.clamp(-0.5, 2)"),
    *("{f}.clamp(min={f})", "torch.clamp({f}, max={f})", "{f}.clip(-3, 0)", "{f}.clamp_min(-2)"),
    *("torch.minimum({f}, {f})", "torch.maximum({f}, {f})", "torch.max({f}, {f})", "torch.min({f}, {f})"),
    *("-torch.minimum({f} * {f}, {f}.clamp(0.8, 1.2) * {f})", "torch.lerp({f}, {f}, 0.3)", "torch.logaddexp({f}, {f})"),
    *("huber_loss({f}, {f}, reduction='none')", "huber_loss({f}, {f}, reduction='none', delta=0.3)"),
    *("torch.where({b}, {f}, {f})", "torch.where({b}, {f}, 0.0)", "{f}.where({b}, {f})", "{f}.masked_fill({b}, 0.5)"),
    *("({b} * {f})", "({f} * {b})", "{b}.to(t.logp.dtype)", "{b}.float() * {f}"),
    *("torch.nan_to_num({f}, nan=0.0, posinf=1.0, neginf=-1.0)", "({f} * {i})", "({f} + {i})", "({i} * 0.25) * {f}"),
    *("({i} - {i}) * {f}", "({i} * {i}) * {f}", "{i}.to(t.logp.dtype)", "(2 - {i}) * {f}"),
    *("({f} * {d}).to(t.logp.dtype)", "{d}.to(t.logp.dtype)", "({d} - {d}).to(t.logp.dtype) * {f}"),
)
"""Where a number is computed from numbers f, truth values b, integers i, and numbers of another precision d."""

TRUTHS = (
    *("({f} < {f})", "({f} <= {f})", "({f} > {f})", "({f} >= {f})", "({f} > 0.1)", "({f} < -0.7)", "({f} != 0)"),
    *("({i} > 2)", "({i} == 1)", "({i} != 3)", "({i} <= {i})", "torch.isfinite({f})", "torch.isnan({f})", "~{b}"),
    *("torch.isinf({f})", "({b} & {b})", "({b} | {b})", "torch.logical_and({b}, {b})", "torch.logical_not({b})"),
    *("torch.logical_or({b}, {b})", "({f} < {f}.detach())", "({d} > 0)"),
)

USUAL = (
    "torch.exp({f} - {f}.detach())",
    "torch.exp((t.logp - t.old_logp).clamp(-20, 20))",
    "-torch.exp(t.logp - t.old_logp) * t.advantage",
    "(torch.exp((t.ref_logp - t.logp).clamp(max=20)) - (t.ref_logp - t.logp) - 1)",
    "-t.logp",
    "t.entropy",
    "t.logp * t.advantage",
)
"""What objectives are made of most often."""

LEAVES = {
    "f": ("t.logp", "t.logp", "t.entropy", "t.lse", "t.old_logp", "t.ref_logp", "t.advantage", "t.half", "t.brain"),
    "b": ("t.flag", "(t.advantage > 0)"),
    "i": ("t.count", "t.byte", "t.short", "t.per_sequence"),
    "d": ("t.precise",),
}
"""Statistics and fields, by kind; ``FIELDS`` says of which dtype and shape the fields are."""

FIELDS: Mapping[str, torch.dtype] = {
    "half": torch.float16,
    "brain": torch.bfloat16,
    "precise": torch.float64,
    "flag": torch.bool,
    "count": torch.int64,
    "byte": torch.uint8,
    "short": torch.int16,
    "per_sequence": torch.int32,
}

MAX_DEPTH = 5


@dataclass(frozen=True)
class Written:
    """An objective from its source.

    Args:
        source: body of a function of ``t``.
        scope: how far it looks.
    """

    source: str
    scope: str = "token"

    @cached_property
    def _code(self) -> CodeType:
        lines = "\n    ".join(self.source.splitlines())
        return compile(f"def objective(t):\n    {lines}", "<objective>", "exec")

    @cached_property
    def _function(self) -> Any:
        from torch.nn.functional import huber_loss, logsigmoid, relu, softplus

        names = {"torch": torch, "huber_loss": huber_loss, "logsigmoid": logsigmoid, "relu": relu, "softplus": softplus}
        exec(self._code, names)
        return names["objective"]

    def __call__(self, t: Any) -> Tensor:
        return self._function(t)

    @property
    def reads(self) -> frozenset[str]:
        """Names of the attributes of the tokens that the source has."""
        return frozenset(re.findall(r"\bt\.(\w+)", self.source))


class Writer:
    """Writes an objective, one assignment after another."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.lines: list[str] = []
        self.variables: list[str] = []

    def number(self, depth: int) -> str:
        random = self.random
        if depth <= 0 or random.random() < 0.12:
            return self._leaf("f")
        templates = USUAL if random.random() < 0.25 else NUMBERS
        return self._filled(random.choice(templates), depth)

    def _truth(self, depth: int) -> str:
        if depth <= 0 or self.random.random() < 0.3:
            return self._leaf("b")
        return self._filled(self.random.choice(TRUTHS), depth)

    def _leaf(self, kind: str) -> str:
        if kind == "f" and self.variables and self.random.random() < 0.4:
            return self.random.choice(self.variables)
        return self.random.choice(LEAVES[kind])

    def _filled(self, template: str, depth: int) -> str:
        make = {"f": self.number, "b": self._truth, "i": lambda _: self._leaf("i"), "d": lambda _: self._leaf("d")}
        text = re.sub(r"\{([fbid])\}", lambda found: make[found[1]](depth - 1), template)
        return f"({text})"

    def assign(self, depth: int) -> None:
        name = f"v{len(self.variables)}"
        line = f"{name} = {self.number(depth)}"
        if self.random.random() < 0.1:
            line = f"with torch.no_grad():\n    {line}"
        self.lines.append(line)
        self.variables.append(name)


def written(random: Random) -> Written:
    """An objective of token scope."""
    writer = Writer(random)
    for _ in range(random.choice((0, 0, 1, 2))):
        writer.assign(random.randint(1, 3))
    value = writer.number(random.randint(1, MAX_DEPTH - 1))
    return Written("\n".join([*writer.lines, f"return {value}"]))
