"""Advantages: from rewards, and rules for the advantage of a token (``WithAdvantage``). None has a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import AboveOne, Field, NonNegative, Parameters, Positive
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["AdvantageWeighted", "EntropyShaped", "PrefixWeighted", "SequenceMeanAdvantage", "TeacherAdvantage"]


def group_advantages(rewards: Tensor, group_size: int, *, eps: float = 1e-4) -> Tensor:
    """Advantages relative to the group: how much better a sample is than the others for the same question.

        A_i = (r_i - mean(r)) / (std(r) + eps)         over the group of sample i

    Source: Shao et al. 2024 (arXiv:2402.03300v3), section 4.1.2; std with Bessel's correction, eps as in TRL.

    Args:
        rewards: [S] float, the samples of a question next to each other.
        group_size: samples per question, at least 2; divides S.
        eps: keeps a group of equal rewards at advantage 0.

    Returns:
        [S] float32 (float64 for float64 rewards).

    Raises:
        TypeError: when ``rewards`` is not a floating-point tensor.
        ValueError: when ``rewards`` is not [S], or ``group_size`` does not divide S.

    Examples:
        Two questions with two samples each; the samples of the second earn the same:

        >>> uk.group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2)
        tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    if not isinstance(rewards, Tensor) or not rewards.is_floating_point():
        got = rewards.dtype if isinstance(rewards, Tensor) else type(rewards).__name__
        raise TypeError(f"rewards must be a floating-point tensor, got {got}")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [S], got {tuple(rewards.shape)}")
    if group_size < 2 or rewards.numel() % group_size:
        raise ValueError(f"group_size must be at least 2 and divide the {rewards.numel()} rewards, got {group_size}")
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    return (centred / (groups.std(-1, keepdim=True) + eps)).view(-1)


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
