"""Regression: the log-ratio of a sequence is fitted to the value that it has for the optimal policy, from rewards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import Field, Positive
from unirl_kernels.objectives.loss import Metrics, Objective
from unirl_kernels.objectives.scores import LogRatio, Score
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["A2PO", "SPPO", "FlowRL", "TrajectoryBalance"]


@dataclass(frozen=True)
class A2PO(Objective):
    """(beta log pi / pi_ref - (R - V))^2, log-ratio of the sequence, reward R, optimal value V of the question.

    Source: Brantley et al. 2025 (A*-PO, arXiv:2505.20686); TRL ``a2po``. Fields ``reward`` and ``value``: [S].

    Args:
        beta: > 0.
    """

    beta: Positive = 1e-3

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        return t.to_tokens(torch.square(self._reward(t) - self._target(t)))

    def _reward(self, t: Tokens) -> Tensor:
        return self.beta * t.sequence_sum(t.logp - t.ref_logp)

    def _target(self, t: Tokens) -> Tensor:
        return t.sequence_field("reward") - t.sequence_field("value")

    def metrics(self, t: Tokens) -> Metrics:
        """``implicit_reward`` and ``advantage`` of each sequence."""
        return {"implicit_reward": self._reward(t), "advantage": self._target(t)}


@dataclass(frozen=True)
class FlowRL(Objective):
    """(log Z + mean log pi / pi_ref - beta R)^2: sequences in proportion to e^(beta R).

    Field ``log_z``: [S], what a head of the model predicts; its gradient is given. Field ``reward``: [S].

    Source: Zhu et al. 2025 (arXiv:2509.15207), eq. 6, without the importance weight.

    Args:
        beta: > 0.
    """

    beta: Positive = 15.0

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        flow = t.sequence_field("log_z") + t.sequence_mean(t.logp - t.ref_logp)
        return t.to_tokens(torch.square(flow - self.beta * t.sequence_field("reward")))


@dataclass(frozen=True)
class TrajectoryBalance(Objective):
    """(R - reward / beta + log Z)^2, log Z the mean over the group of reward / beta - R, without a gradient.

    Fields ``reward`` and ``group``: [S].

    Source: Bartoldson et al. 2025 (TBA, arXiv:2503.18929), with log Z by VarGrad.

    Args:
        beta: temperature of the rewards, > 0.
        score: R.
    """

    beta: Positive = 1.0
    score: Score = LogRatio()

    scope = "batch"

    def __call__(self, t: Tokens) -> Tensor:
        difference = self.score(t) - t.sequence_field("reward") / self.beta
        return t.to_tokens(torch.square(difference - t.group_mean(difference).detach()))


@dataclass(frozen=True)
class SPPO(Objective):
    """(R - (P - 1/2) / beta)^2, P how often the sequence wins against others, in [0, 1]: field ``win_rate``, [S].

    Source: Wu et al. 2024 (arXiv:2405.00675), eq. 4.7.

    Args:
        beta: > 0.
        score: R.
        win_rate: name of the field.
    """

    beta: Positive = 1e-3
    score: Score = LogRatio()
    win_rate: Field = "win_rate"

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        target = (t.sequence_field(self.win_rate) - 0.5) / self.beta
        return t.to_tokens(torch.square(self.score(t) - target))
