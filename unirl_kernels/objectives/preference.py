"""Preferences: losses of pairs of sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from unirl_kernels.objectives.arguments import check_number
from unirl_kernels.objectives.loss import Objective, Paradigm
from unirl_kernels.objectives.tokens import Tokens


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation, -log sigma(beta (R(o+) - R(o-))), R the log-ratio to the reference policy.

        R(o) = sum_t log pi(o_t) / pi_ref(o_t),     divided by |o| when length-normalised

    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7 (the sum); Shao et al. 2024 (arXiv:2402.03300v3), eq. 6
    (the mean). Its coefficient is +-beta sigma(beta (R(o-) - R(o+))); eq. 7 of Shao et al. prints it without beta
    and with log-ratios of tokens in place of those of sequences.

    Args:
        beta: inverse temperature of the preference model, > 0.
        length_normalized: divide each sequence's log-ratio by its length, as (6) does.

    Raises:
        TypeError: when ``beta`` is not a number.
        ValueError: when ``beta`` is not positive.
    """

    beta: float = 0.1
    length_normalized: bool = False

    scope = "pair"
    paradigm = Paradigm(
        "DPO",
        "(6), (7)",
        "q ~ P_sft, o+, o- ~ pi_sft",
        "rule or model",
        "log sigma(beta R(o+) - beta R(o-)), R = log pi / pi_ref of the sequence",
        "+-beta sigma(beta R(o-) - beta R(o+))",
    )

    def __post_init__(self) -> None:
        check_number("beta", self.beta)
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")

    def __call__(self, t: Tokens) -> Tensor:
        log_ratio = t.logp - t.ref_logp
        reward = self.beta * (t.sequence_mean(log_ratio) if self.length_normalized else t.sequence_sum(log_ratio))
        chosen, rejected = t.pairs(reward)
        return -logsigmoid(chosen - rejected)
