"""The truth: what a case is to give, by plain PyTorch that shares nothing with the package.

In fp64 it is the truth; in fp32 it is what people write by hand, and its error the yardstick.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.fuzz.inputs import Inputs


class Statistics(NamedTuple):
    """[..., T] each."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


def readout(x: Tensor, inputs: Inputs, temperature: Tensor) -> Tensor:
    """z = softcap tanh(scale x / softcap) / temperature of rows x, [..., T, V]."""
    case = inputs.case
    z = x * case.scale
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    return z / temperature.to(x.dtype).unsqueeze(-1)


def statistics(z: Tensor, target: Tensor) -> Statistics:
    """Of rows of z, [..., T, V]; the target of an ignored row is its first column."""
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)
    column = target.clamp(min=0).expand(z.shape[:-1]).unsqueeze(-1)
    logp = log_p.gather(-1, column).squeeze(-1)
    # By the largest: torch.logsumexp goes back by way of the rounded lse.
    top = z.detach().argmax(-1, keepdim=True)
    return Statistics(logp, entropy, (z.gather(-1, top) - log_p.gather(-1, top)).squeeze(-1))


class Observations(NamedTuple):
    """[..., T] each."""

    log_sum_sq_probs: Tensor
    mean_logit: Tensor
    argmax: Tensor


def observations(x: Tensor, z: Tensor, scale: float) -> Observations:
    log_p = torch.log_softmax(z, -1)
    return Observations(torch.logsumexp(2 * log_p, -1), z.mean(-1), (x * (1 if scale > 0 else -1)).argmax(-1))


class Tokens:
    """What an objective reads, with loops over sequences where the package has none.

    Args:
        inputs: the case's.
        stats: [n, T] each, n batches that differ in their statistics alone, in the precision to compute in; 0 at
            ignored positions.
    """

    def __init__(self, inputs: Inputs, stats: Statistics) -> None:
        self._inputs = inputs
        self.logp, self.entropy, self.lse = stats

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        inputs = self._inputs
        if name == "old_logp" and name not in inputs.fields:
            return self.logp.detach()
        return self._wide(torch.where(inputs.valid, x := inputs.per_token(name), torch.zeros_like(x)))

    def _wide(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bool:
            x = x.to(torch.promote_types(x.dtype, self.logp.dtype) if x.is_floating_point() else torch.int64)
        return x.expand(len(self.logp), -1)

    @property
    def valid(self) -> Tensor:
        return self._inputs.valid.expand(len(self.logp), -1)

    def to_tokens(self, x: Tensor) -> Tensor:
        return x[:, self._inputs.sequence_of]

    def sequence_sum(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, o].sum(-1) for o in self._inputs.positions], -1)

    def sequence_mean(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, o].sum(-1) / max(1, len(o)) for o in self._inputs.positions], -1)

    def sequence_scan(self, x: Tensor, decay: float, reverse: bool = False) -> Tensor:
        out = [torch.zeros_like(x[:, 0])] * x.shape[1] if x.shape[1] else []
        for o in self._inputs.positions:
            y = x.new_zeros(len(x))
            for t in reversed(o) if reverse else o:
                y = out[t] = x[:, t] + decay * y
        return torch.stack(out, -1) if out else x

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[1] // 2
        return (x[:, ::2], x[:, 1::2]) if self._inputs.interleaved else (x[:, :half], x[:, half:])

    def group_mean(self, x: Tensor) -> Tensor:
        groups = self._inputs.fields["group"].tolist()
        return torch.stack([x[:, [j for j, h in enumerate(groups) if h == g]].mean(-1) for g in groups], -1)
