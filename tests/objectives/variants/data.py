"""A small batch with every field that a row of the table reads, in both layouts, and the oracle's view of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import unirl_kernels as uk

VOCAB, WIDTH = 11, 6
RAGGED = (3, 2, 0, 4, 1, 2)
"""Valid tokens of each sequence: pairs are (0, 3), (1, 4), (2, 5); the third has none."""
WHOLE = (3, 2, 1, 4, 1, 2)
"""For objectives that are not defined where a sequence has no tokens."""
AS_MANY = (2, 0, 0, 1, 0, 0)
"""Packed, with the ignored tokens in front, as many tokens as sequences."""

GROUP = [7, 3, 3, 7, 7, 3]
RANK = [0, 1, 0, 1, 2, 2]

NEAR = {"old_logp": 0.5, "ref_logp": 0.4, "rollout_logp": 0.4, "teacher_logp": 0.6}
"""Log-probabilities of other policies: how far they are from those of the policy, nats."""


@dataclass(frozen=True)
class Data:
    """The valid tokens, one after the other, and the fields by name."""

    lengths: tuple[int, ...]
    hidden: Tensor  # [n, WIDTH]
    weight: Tensor  # [VOCAB, WIDTH]
    target: Tensor  # [n]
    of_tokens: dict[str, Tensor]  # [n] each
    of_sequences: dict[str, Tensor]  # [S] or []

    @property
    def logits(self) -> Tensor:
        return (self.hidden.double() @ self.weight.double().t()).float()

    def batch(self, names: Sequence[str], packed: bool) -> uk.Batch:
        """A batch with some of the fields, ``name`` or ``name:source``; NaN, which must not matter, where ignored."""
        given = {name.split(":")[0]: self.field(name.split(":")[-1], packed) for name in names}
        of_sequences = [name.split(":")[0] for name in names if name.split(":")[-1] in self.of_sequences]
        known = {name: given.pop(name) for name in ("advantage", "old_logp", "ref_logp") if name in given}
        target = self.laid_out(self.target, packed, uk.IGNORE)
        ends = None
        if packed:
            sizes = [n + ahead(s) for s, n in enumerate(self.lengths)]
            ends = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
        named = of_sequences if packed and len(target) == len(self.lengths) else None
        return uk.Batch(target, **known, cu_seqlens=ends, fields=given, sequence_fields=named)

    def field(self, name: str, packed: bool) -> Tensor:
        if name in self.of_sequences:
            return self.of_sequences[name]
        x = self.of_tokens[name]
        return self.laid_out(x, packed, float("nan") if x.is_floating_point() else 1)

    def laid_out(self, x: Tensor, packed: bool, fill: float) -> Tensor:
        """[n, ...] in a layout, with ``fill`` at ignored positions: prompts in front, padding behind."""
        longest = max(n + ahead(s) for s, n in enumerate(self.lengths))
        rows, start = [], 0
        for s, n in enumerate(self.lengths):
            size = n + ahead(s) if packed else longest
            row = x.new_full((size, *x.shape[1:]), fill)
            row[ahead(s) : ahead(s) + n] = x[start : start + n]
            rows.append(row)
            start += n
        return torch.cat(rows) if packed else torch.stack(rows)


def ahead(sequence: int) -> int:
    """Ignored tokens in front of a sequence."""
    return sequence % 2


def make(lengths: tuple[int, ...] = RAGGED, seed: int = 16) -> Data:
    """Policies a realistic distance apart, advantages of both signs. By this seed nearly every bound bites."""
    random = torch.Generator().manual_seed(seed)
    n, s = sum(lengths), len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    hidden, weight = normal(n, WIDTH), normal(VOCAB, WIDTH)
    target = torch.randint(0, VOCAB, (n,), generator=random)
    hidden = hidden + 0.3 * uniform(n, 1) * weight[target]
    logp = torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(-1, target[:, None])[:, 0].float()
    of_tokens = {name: logp + far * normal(n) for name, far in NEAR.items()}
    of_tokens |= {
        "token_weight": 2 * uniform(n),
        "rollout_weight": 0.5 + uniform(n),
        "answer": torch.arange(n) % 3 != 0,
        "keep": torch.arange(n) % 4 != 2,
        "token_advantage": normal(n),
    }
    sign = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0][:s])
    of_sequences = {
        "advantage": sign * (0.3 + uniform(s)),
        "verdict": sign > 0,
        "reward": normal(s),
        "value": 0.3 * normal(s),
        "group": torch.tensor(GROUP[:s]),
        "rank": torch.tensor(RANK[:s]),
        "label": torch.tensor([True, False, True, False, False, True][:s]),
        "expert": torch.tensor([False, False, False, True, True, False][:s]),
        "chosen": torch.arange(s) < s // 2,
        "gold": torch.tensor(RANK[:s]) == 2,
        "from_reference": torch.tensor([True, False, False, False, True, True][:s]),
        "win_rate": uniform(s),
        "sample_weight": 0.5 + uniform(s),
        "log_z": normal(s),
        "ref_sum": -3 * uniform(s) - 1,
        "rl_weight": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0][:s]),
        "ce_weight": torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0][:s]),
        "opd_weight": torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 1.0][:s]),
        "kl": torch.tensor(0.2),
    }
    return Data(lengths, hidden, weight, target, of_tokens, of_sequences)


@dataclass
class Answer:
    """One sequence as the oracle sees it: [n] vectors of its valid tokens, and numbers. Any field is an attribute."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.fields[name]

    def __len__(self) -> int:
        return len(self.logp)


Oracle = Callable[[list[Answer]], Tensor]


def answers(data: Data, logits: Tensor, names: Sequence[str]) -> list[Answer]:
    """Log-probabilities by a plain log-softmax, and fields as numbers; on policy where no ``old_logp`` is."""
    log_p = torch.log_softmax(logits, -1)
    logp = log_p.gather(-1, data.target[:, None])[:, 0]
    entropy, lse = -(log_p.exp() * log_p).sum(-1), torch.logsumexp(logits, -1)
    found, start = [], 0
    for s, n in enumerate(data.lengths):
        at = slice(start, start + n)
        fields: dict[str, Any] = {"old_logp": logp[at].detach()}
        for name, source in ((spec.split(":")[0], spec.split(":")[-1]) for spec in names):
            if source in data.of_tokens:
                x = data.of_tokens[source][at]
            else:
                x = data.of_sequences[source]
                x = x[s] if x.dim() else x
            fields[name] = x.to(logits.dtype)
        found.append(Answer(logp[at], entropy[at], lse[at], fields))
        start += n
    return found
