"""Random losses: sums of terms, each an objective with an aggregation and a coefficient."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

import unirl_kernels as uk
from tests.fuzz.expressions import FIELDS, Writer, Written, written
from tests.fuzz.inputs import Inputs
from tests.fuzz.naive import Statistics, Tokens
from tests.fuzz.roundings import OtherRoundings
from tests.fuzz.yardstick import Evaluated

WIDE = {
    "sequence": (
        "ratio = t.to_tokens(torch.exp(t.sequence_mean(t.logp - t.old_logp).clamp(max=10)))\n"
        "return -torch.minimum(ratio * t.advantage, ratio.clamp(0.9, 1.1) * t.advantage)",
        "return {f} * t.to_tokens(t.sequence_mean({f}))",
        "return {f} * torch.exp(t.to_tokens(t.sequence_sum({f})).clamp(-5, 5))",
        "return {f} * t.sequence_scan({f}, 0.9)",
        "return {f} + t.sequence_scan({f}, 0.5, reverse=True)",
        "return {f}",
    ),
    "pair": (
        "chosen, rejected = t.pairs(0.1 * t.sequence_sum(t.logp - t.ref_logp))\nreturn -logsigmoid(chosen - rejected)",
        "chosen, rejected = t.pairs(t.sequence_mean({f}))\nreturn torch.relu(1 - (chosen - rejected))",
        "chosen, rejected = t.pairs(t.sequence_mean({f}))\nreturn chosen * torch.sigmoid(rejected.detach())",
    ),
    "batch": (
        "x = {f}\nreturn x - x.mean(-1, keepdim=True)",
        "return {f} * (t.valid * {f}).sum(-1, keepdim=True) / t.valid.sum(-1, keepdim=True).clamp(min=1)",
        "reward = t.sequence_mean({f})\nreturn {f} * t.to_tokens(reward - t.group_mean(reward))",
    ),
}
"""Objectives that look further than one token; {f} is a number of each token."""

RECIPES: dict[str, tuple[Any, str]] = {
    "sft": (uk.sft, "return -t.logp"),
    "rft": (uk.rft, "return -(t.advantage * t.logp)"),
    "ppo": (
        uk.ppo,
        "r = torch.exp((t.logp - t.old_logp).clamp(-40, 40))\n"
        "return -torch.where(t.advantage >= 0, r.clamp(max=1.2), r.clamp(min=0.8)) * t.advantage",
    ),
    "grpo": (
        lambda: uk.grpo(None, 0.1),
        "d = (t.ref_logp - t.logp).clamp(max=40)\n"
        "r = torch.exp((t.logp - t.old_logp).clamp(-40, 40))\n"
        "return -r * t.advantage + 0.1 * (torch.expm1(d) - d)",
    ),
}
"""Recipes, and the same formulas as a user would write them; log-ratios are bounded by 40."""


@dataclass(frozen=True)
class Aggregation:
    """One of the package's aggregations, and its weights by counting.

    Args:
        kind: its name.
        count: a global count, or None.
        empty: "count" or "skip".
        n: of ``FixedLength``.
        field: of ``Weighted`` around it, or None.
    """

    kind: str
    count: float | None = None
    empty: str = "count"
    n: float = 7.0
    field: str | None = None

    def made(self, as_tensor: bool) -> Any:
        count = torch.tensor(self.count) if as_tensor and self.count is not None else self.count
        base = {
            "SequenceMean": lambda: uk.SequenceMean(count, self.empty),
            "TokenMean": lambda: uk.TokenMean(count),
            "FixedLength": lambda: uk.FixedLength(self.n, count, self.empty),
            "GroupMean": lambda: uk.GroupMean(count=count),
            "PairMean": lambda: uk.PairMean(count),
        }[self.kind]()
        return base if self.field is None else uk.Weighted(base, self.field)

    def weights(self, inputs: Inputs) -> Tensor:
        """[T], or [S / 2] for pairs; float64."""
        weights = self._of_pairs(inputs) if self.kind == "PairMean" else self._of_tokens(inputs)
        if self.field is None:
            return weights
        if self.kind != "PairMean":
            return torch.where(weights == 0, 0, weights * inputs.per_token(self.field).double())
        value = inputs.fields[self.field].double().expand(inputs.n_sequences)
        half = len(value) // 2
        first, second = (value[::2], value[1::2]) if inputs.interleaved else (value[:half], value[half:])
        return weights * first * second

    def _of_pairs(self, inputs: Inputs) -> Tensor:
        n = inputs.n_sequences // 2
        return torch.full((n,), 1 / (self.count or max(n, 1)), dtype=torch.float64)

    def _of_tokens(self, inputs: Inputs) -> Tensor:
        weights = torch.zeros(len(inputs.flat_target), dtype=torch.float64)
        positions = inputs.positions
        sequences = self.count or (len(positions) if self.empty == "count" else max(1, sum(map(bool, positions))))
        tokens = self.count or max(1, sum(map(len, positions)))
        groups = inputs.fields["group"].tolist() if self.kind == "GroupMean" else []
        for s, o in enumerate(positions):
            if not o:
                continue
            if self.kind == "SequenceMean":
                weights[o] = 1 / (sequences * len(o))
            elif self.kind == "TokenMean":
                weights[o] = 1 / tokens
            elif self.kind == "FixedLength":
                weights[o] = 1 / (sequences * self.n)
            else:
                size = sum(len(p) for p, g in zip(positions, groups, strict=True) if g == groups[s])
                n = len({g for p, g in zip(positions, groups, strict=True) if p})
                weights[o] = 1 / ((self.count or n) * size)
        return weights


@dataclass(frozen=True)
class Term:
    objective: Written
    aggregation: Aggregation
    coefficient: float
    recipe: str | None = None


@dataclass(frozen=True)
class RandomLoss:
    """A loss of the package, and what it is by plain PyTorch."""

    terms: tuple[Term, ...]

    def made(self, random: Random) -> uk.Loss:
        """The package's."""
        loss: Any = 0
        for term in self.terms:
            one = (
                RECIPES[term.recipe][0]()
                if term.recipe
                else uk.Loss(term.objective, term.aggregation.made(random.random() < 0.3))
            )
            if term.coefficient == -1 and loss != 0:
                loss = loss - one
            else:
                loss = loss + (one if term.coefficient == 1 else term.coefficient * one)
        return loss

    @property
    def scope(self) -> str:
        scopes = ("token", *WIDE)
        return max((term.objective.scope for term in self.terms), key=scopes.index)

    @property
    def reads(self) -> set[str]:
        """Names of the fields."""
        names = set().union(*(term.objective.reads for term in self.terms))
        weights = {term.aggregation.field for term in self.terms if term.aggregation.field}
        groups = (
            {"group"} if any(t.aggregation.kind == "GroupMean" for t in self.terms) or "group_mean" in names else set()
        )
        return (names & {*FIELDS, "advantage", "old_logp", "ref_logp"}) | weights | groups

    def evaluate(self, inputs: Inputs, stats: Statistics, roundings: bool = False) -> Evaluated:
        """By plain PyTorch, in the dtype of the statistics, [n, T] each; ``roundings``: other ones in each of n."""
        with OtherRoundings(len(stats.logp)) if roundings else nullcontext():
            return self._evaluate(inputs, stats)

    def _evaluate(self, inputs: Inputs, stats: Statistics) -> Evaluated:
        leaves = torch.stack(list(stats)).requires_grad_()
        tokens = Tokens(inputs, Statistics(*leaves.unbind()))
        parts = []
        weight = torch.zeros(len(inputs.flat_target), dtype=torch.float64)
        for term in self.terms:
            weights = term.coefficient * term.aggregation.weights(inputs)
            values = torch.where(weights != 0, term.objective(tokens).to(leaves.dtype), 0)
            parts.append(values * weights.to(leaves.dtype))
            weight += (
                weights.abs() if len(weights) == len(weight) and term.objective.scope != "pair" else weights.abs().sum()
            )
        total = torch.stack([part.sum() for part in parts]).sum()
        derivatives = torch.zeros_like(leaves)
        if total.requires_grad:
            (found,) = torch.autograd.grad(total, leaves, allow_unused=True)
            derivatives = derivatives if found is None else found
        return Evaluated(tuple(p.detach().double() for p in parts), derivatives.movedim(1, 0).double(), weight)

    def __str__(self) -> str:
        return "\n".join(
            f"{term.coefficient} * {term.aggregation} {term.recipe or ''} {term.objective.scope}\n    "
            + "\n    ".join(term.objective.source.splitlines())
            for term in self.terms
        )


def make(inputs: Inputs) -> RandomLoss:
    """The loss of a case."""
    random = inputs.case.random("loss")
    one_pass = inputs.case.kernel not in (None, "composed")
    n = random.choice((1, 1, 1, 2, 3))
    return RandomLoss(tuple(_term(inputs, random, one_pass) for _ in range(n)))


def _term(inputs: Inputs, random: Random, one_pass: bool) -> Term:
    coefficient = random.choice((1, 1, -1, 0.01, -2.5))
    if random.random() < 0.1:
        name = random.choice(list(RECIPES))
        return Term(Written(RECIPES[name][1]), Aggregation("SequenceMean"), coefficient, name)
    scope = "token" if one_pass or random.random() < 0.7 else random.choice(list(WIDE))
    if scope == "pair" and inputs.n_sequences % 2:
        scope = "sequence"
    aggregation = _aggregation(random, scope)
    if scope == "token":
        return Term(written(random), aggregation, coefficient)
    writer = Writer(random)
    source = random.choice(WIDE[scope])
    while "{f}" in source:
        source = source.replace("{f}", writer.number(random.randint(0, 2)), 1)
    return Term(Written(source, scope), aggregation, coefficient)


def _aggregation(random: Random, scope: str) -> Aggregation:
    count = random.choice((None, None, None, 1.0, 37.0, 0.5))
    if scope == "pair":
        return Aggregation("PairMean", count, field=random.choice((None, None, "per_sequence")))
    kind = random.choice(("SequenceMean", "SequenceMean", "TokenMean", "FixedLength", "GroupMean"))
    field = random.choice((None, None, None, "flag", "half", "advantage", "per_sequence"))
    return Aggregation(kind, count, random.choice(("count", "skip")), random.choice((1.0, 7.0, 4096.0)), field)
