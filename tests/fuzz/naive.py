"""The truth: what a case is to give, by plain PyTorch that shares nothing with the package.

In fp64 it is the truth; in fp32 it is what people write by hand, and its error the yardstick.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.fuzz.inputs import Inputs


class Statistics(NamedTuple):
    """[T] each."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


def readout(x: Tensor, inputs: Inputs, temperature: Tensor) -> Tensor:
    """z = softcap tanh(scale x / softcap) / temperature of rows x, [T, V]."""
    case = inputs.case
    z = x * case.scale
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    return z / temperature.to(x.dtype).unsqueeze(-1)


def statistics(z: Tensor, target: Tensor) -> Statistics:
    """Of rows of z, [T, V]; a row that is ignored has those of its first column as target."""
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)
    logp = log_p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return Statistics(logp, entropy, torch.logsumexp(z, -1))


class Observations(NamedTuple):
    """[T] each."""

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
        stats: [T] each, in the precision to compute in; 0 at ignored positions.
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
        value = inputs.per_token(name)
        value = torch.where(inputs.valid, value, torch.zeros_like(value))
        if value.dtype == torch.bool:
            return value
        return value.to(self.logp.dtype if value.is_floating_point() and name != "precise" else _wide(value.dtype))

    @property
    def valid(self) -> Tensor:
        return self._inputs.valid

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(o) for o in self._inputs.positions])

    def sequence_field(self, name: str) -> Tensor:
        return self._inputs.fields[name].expand(self._inputs.n_sequences)

    def to_tokens(self, x: Tensor) -> Tensor:
        return x[self._inputs.sequence_of]

    def sequence_sum(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(())
        return torch.stack([x[o].sum() if o else zero for o in self._inputs.positions])

    def sequence_mean(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(())
        return torch.stack([x[o].sum() / len(o) if o else zero for o in self._inputs.positions])

    def sequence_scan(self, x: Tensor, decay: float, reverse: bool = False) -> Tensor:
        out = [x.new_zeros(())] * len(x)
        for o in self._inputs.positions:
            y = x.new_zeros(())
            for t in reversed(o) if reverse else o:
                y = x[t] + decay * y
                out[t] = y
        return torch.stack(out) if out else x

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = len(x) // 2
        return (x[:half], x[half:]) if not self._inputs.interleaved else (x[::2], x[1::2])

    def group_mean(self, x: Tensor) -> Tensor:
        groups = self._inputs.fields["group"].tolist()
        return torch.stack([torch.stack([x[j] for j, h in enumerate(groups) if h == g]).mean() for g in groups])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else torch.int64
