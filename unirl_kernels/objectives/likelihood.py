"""Maximum likelihood: supervised fine-tuning, rejection-sampling fine-tuning, and fine-tuning that weighs tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import NonNegative, Number, Positive
from unirl_kernels.objectives.loss import Objective, Paradigm
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["DFT", "EAFT", "RFT", "SFT", "ChordPhi", "ExcessLoss", "Focal", "OnlineRFT", "Unlikelihood"]


@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning, -log pi(o_t).  Shao et al. 2024 (arXiv:2402.03300v3), eq. 2."""

    paradigm = Paradigm("SFT", "(2)", "q, o ~ P_sft", "-", "log pi", "1")

    def __call__(self, t: Tokens) -> Tensor:
        return -t.logp


@dataclass(frozen=True)
class RFT(Objective):
    """Rejection-sampling fine-tuning, -I(o) log pi(o_t), where ``advantage`` holds the verdict I(o) in {0, 1}.

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 3 and 4.
    """

    paradigm = Paradigm("RFT", "(3), (4)", "q ~ P_sft, o ~ pi_sft", "rule", "I(o) log pi", "I(o)")

    def __call__(self, t: Tokens) -> Tensor:
        return -(t.advantage * t.logp)


@dataclass(frozen=True)
class OnlineRFT(RFT):
    """RFT on samples of the policy that is being trained.  Shao et al. 2024 (arXiv:2402.03300v3), eq. 5."""

    paradigm = Paradigm("Online RFT", "(5), (4)", "q ~ P_sft, o ~ pi_theta", "rule", "I(o) log pi", "I(o)")


@dataclass(frozen=True)
class DFT(Objective):
    """Dynamic fine-tuning, -sg(p) log p with p = pi(o_t).  Wu et al. 2025 (arXiv:2508.05629); TRL ``dft``."""

    def __call__(self, t: Tokens) -> Tensor:
        return -torch.exp(t.logp).detach() * t.logp


@dataclass(frozen=True)
class Focal(Objective):
    """Focal loss, -(1 - p)^gamma log p.  Lin et al. 2017 (arXiv:1708.02002), eq. 4.

    Args:
        gamma: how much sure tokens are weighed down, >= 0; 0 is ``SFT``.
    """

    gamma: NonNegative = 2.0

    def __call__(self, t: Tokens) -> Tensor:
        return -((-torch.expm1(t.logp)) ** self.gamma) * t.logp


@dataclass(frozen=True)
class Unlikelihood(Objective):
    """-log(1 - p): makes a token less likely; inf where p = 1.  Welleck et al. 2019 (arXiv:1908.04319)."""

    def __call__(self, t: Tokens) -> Tensor:
        return -torch.log(-torch.expm1(t.logp))


@dataclass(frozen=True)
class ChordPhi(Objective):
    """-sg(p (1 - p)) log p: most for tokens that are neither sure nor hopeless.

    Source: Zhang et al. 2025 (CHORD, arXiv:2508.11408); Trinity-RFT.
    """

    def __call__(self, t: Tokens) -> Tensor:
        p = torch.exp(t.logp).detach()
        return -p * (1 - p) * t.logp


@dataclass(frozen=True)
class EAFT(Objective):
    """Entropy-adaptive fine-tuning, -sg((H / scale)^alpha) log pi, H the entropy of the whole distribution.

    Source: Diao et al. 2026 (arXiv:2601.02151), who take H over the 20 most probable tokens and divide by log 20.

    Args:
        alpha: exponent, > 0.
        scale: entropy of weight 1, nats, > 0.
    """

    alpha: Positive = 1.0
    scale: Positive = 3.0

    def __call__(self, t: Tokens) -> Tensor:
        return -((t.entropy / self.scale).clamp(min=0) ** self.alpha).detach() * t.logp


@dataclass(frozen=True)
class ExcessLoss(Objective):
    """-log pi of the tokens that the reference knows better, log pi_ref / pi > threshold; else 0.

    Source: Lin et al. 2024 (Rho-1, arXiv:2404.07965), with a threshold in place of a share; for a share of
    the batch's tokens see ``TopExcess``.

    Args:
        threshold: of the excess loss, nats.
    """

    threshold: Number = 0.0

    def __call__(self, t: Tokens) -> Tensor:
        excess = (t.ref_logp - t.logp).detach()
        return torch.where(excess > self.threshold, -t.logp, 0)
