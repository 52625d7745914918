"""Rules for the advantage of a token, for ``WithAdvantage``. None has a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import AboveOne, Field, NonNegative, Parameters, Positive
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["AdvantageWeighted", "EntropyShaped", "PrefixWeighted", "SequenceMeanAdvantage", "TeacherAdvantage"]


@dataclass(frozen=True)
class EntropyShaped(Parameters):
    """A + min(alpha H, |A| / kappa).  Cheng et al. 2025 (Reasoning with exploration, arXiv:2506.14758).

    Args:
        alpha: of the entropy, >= 0.
        kappa: how much of A the bonus may be, > 1.
    """

    alpha: NonNegative = 0.4
    kappa: AboveOne = 2.0

    def __call__(self, t: Tokens) -> Tensor:
        bonus = torch.minimum(self.alpha * t.entropy.detach(), torch.abs(t.advantage) / self.kappa)
        return t.advantage + bonus


@dataclass(frozen=True)
class AdvantageWeighted(Parameters):
    """A exp(A / temperature), unnormalised.  Yao et al. 2025 (arXiv:2509.24203); Trinity-RFT REC.

    Args:
        temperature: > 0.
    """

    temperature: Positive = 1.0

    def __call__(self, t: Tokens) -> Tensor:
        return t.advantage * torch.exp(t.advantage / self.temperature)


@dataclass(frozen=True)
class SequenceMeanAdvantage(Parameters):
    """Mean of A over the sequence.  AReaL, at the level of sequences."""

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        return t.to_tokens(t.sequence_mean(t.advantage))


@dataclass(frozen=True)
class TeacherAdvantage(Parameters):
    """log pi_teacher / pi_student, on-policy distillation as a policy gradient.

    Source: Lu and Thinking Machines 2025, "On-policy distillation"; verl, slime. With ``student="logp"`` the student
    is pi itself, without a gradient.

    Args:
        teacher: the field with the teacher's log-probabilities.
        student: those of the policy that sampled.
    """

    teacher: Field = "teacher_logp"
    student: Field = "old_logp"

    def __call__(self, t: Tokens) -> Tensor:
        return getattr(t, self.teacher) - getattr(t, self.student).detach()


@dataclass(frozen=True)
class PrefixWeighted(Parameters):
    """a (1 + gamma (1 - share of |a| before the token)), a another rule's advantage: IW-OPD.

    Source: "On the position bias of on-policy distillation" 2026 (arXiv:2606.22600); TRL ``iw_opd``.

    Args:
        gamma: >= 0.
        advantage: the rule for a, of token scope.
    """

    gamma: NonNegative = 1.0
    advantage: TeacherAdvantage = TeacherAdvantage(student="logp")

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        a = self.advantage(t)
        size = torch.abs(a)
        total = t.to_tokens(t.sequence_sum(size)).clamp(min=torch.finfo(size.dtype).tiny)
        before = t.sequence_scan(size) - size
        return a * (1 + self.gamma * (1 - before / total))
