"""Distillation from a teacher's log-probabilities of the sampled tokens, field ``teacher_logp``.

Estimates of the divergence are penalties: ``K3("teacher_logp")``, ``LowVarianceKL("teacher_logp")``. Distillation as a
policy gradient is ``WithAdvantage(Clip(), TeacherAdvantage())``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import Positive
from unirl_kernels.objectives.loss import Metrics, Objective
from unirl_kernels.objectives.ratios import ratio
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["OPD", "SDAR", "SampledReverseKL"]


@dataclass(frozen=True)
class OPD(Objective):
    """-r sg(log pi_teacher / pi), r = pi / pi_old: on-policy distillation by the policy that is trained.

    Source: Lu and Thinking Machines 2025, "On-policy distillation"; AReaL, Trinity-RFT, prime-rl ``ref_kl``.
    """

    def __call__(self, t: Tokens) -> Tensor:
        return -ratio(t.logp - t.old_logp) * (t.teacher_logp - t.logp).detach()

    def metrics(self, t: Tokens) -> Metrics:
        """``teacher_kl``: log pi / pi_teacher, estimate k1 of KL(pi || pi_teacher)."""
        return {"teacher_kl": t.logp - t.teacher_logp}


@dataclass(frozen=True)
class SampledReverseKL(Objective):
    """sg(log pi / pi_teacher) log pi, the gradient of KL(pi || pi_teacher) at the sampled token.

    Source: Huebotter et al. 2026 (SDPO), ``sampled_token`` in TRL.
    """

    def __call__(self, t: Tokens) -> Tensor:
        return (t.logp - t.teacher_logp).detach() * t.logp

    def metrics(self, t: Tokens) -> Metrics:
        """``teacher_kl``, as ``OPD``'s."""
        return {"teacher_kl": t.logp - t.teacher_logp}


@dataclass(frozen=True)
class SDAR(Objective):
    """sg(sigma(beta d)) d, d = log pi_teacher / pi: tokens that the teacher knows better, by how sure it is.

    Source: Self-distilled agentic RL; ms-swift ``sdar``.

    Args:
        beta: sharpness of the gate, > 0.
    """

    beta: Positive = 5.0

    def __call__(self, t: Tokens) -> Tensor:
        difference = t.teacher_logp - t.logp
        return torch.sigmoid(self.beta * difference).detach() * difference

    def metrics(self, t: Tokens) -> Metrics:
        """``gate`` and ``teacher_kl``."""
        difference = t.teacher_logp - t.logp
        return {"gate": torch.sigmoid(self.beta * difference), "teacher_kl": -difference}
