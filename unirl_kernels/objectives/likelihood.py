"""Maximum likelihood: supervised fine-tuning and rejection-sampling fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unirl_kernels.objectives.loss import Objective, Paradigm
from unirl_kernels.objectives.tokens import Tokens


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
