"""The losses of TRL's DPOConfig, KTOConfig and SFTConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.batch import Batch
from unirl_kernels.integrations.options import Options
from unirl_kernels.integrations.rules import Logged, TokensOfStep
from unirl_kernels.integrations.trl.logs import JudgedLog, NoLog, PairLog
from unirl_kernels.integrations.trl.policy import check_router_loss
from unirl_kernels.objectives import (
    AOT,
    DFT,
    DPO,
    EXO,
    IPO,
    KTO,
    NCA,
    SFT,
    AlphaDivergence,
    AOTUnpaired,
    APODown,
    APOZero,
    APOZeroUnpaired,
    BCOPair,
    DiscoPOP,
    ForwardKL,
    Hinge,
    JensenShannon,
    LengthMean,
    LogRatio,
    Loss,
    Objective,
    PairMean,
    RobustDPO,
    Scaled,
    SequenceMean,
    SPPOHard,
)
from unirl_kernels.objectives.arguments import (
    Below1Half,
    Field,
    NonNegative,
    Number,
    Parameters,
    Positive,
    Share,
)
from unirl_kernels.objectives.scores import Score

PRECOMPUTED = "ref_logps"
"""The field with log-probabilities of whole sequences under the reference policy, [S]."""

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
OF_DIVERGENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Loss types that have another divergence than the reverse KL."""


def dpo(options: Options) -> Loss:
    """The loss of a DPOConfig; see ``trl.loss``."""
    check_router_loss(options)
    kinds, coefficients = _types(options)
    beta = options.number("beta", Positive)
    ratio = SequenceRatio(
        options.optional("ld_alpha", Share), PRECOMPUTED if options.flag("precompute_ref_log_probs") else None
    )
    score = _divergence(options, ratio)
    log = PairLog(beta, ratio, PolicyPart(ratio))
    weighted = options.flag("use_weighting")
    terms: list[Loss] = []
    for kind, coefficient in zip(kinds, coefficients, strict=True):
        if score is not ratio and kind not in OF_DIVERGENCES:
            raise options.refused("f_divergence_type", f"{kind} has the reverse KL alone; set 'reverse_kl'")
        if weighted and kind in ("aot", "aot_unpaired", "sft"):
            raise options.refused("use_weighting", f"TRL has no weights of pairs with {kind}; set False")
        objective = SFT() if kind == "sft" else _preference(options, kind, beta, ratio, score)
        if weighted:
            objective = Scaled(objective, PairConfidence())
        term = Loss(Logged(objective, NoLog() if terms else log), ChosenTokenMean() if kind == "sft" else PairMean())
        terms.append(term if coefficient == 1 else coefficient * term)
    return sum(terms[1:], terms[0])


def _types(options: Options) -> tuple[list[str], list[float]]:
    """Loss types and their weights."""
    kinds = options.get("loss_type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    known = {name: name for name in (*_PREFERENCES, "sft")}
    if not isinstance(kinds, list) or not kinds:
        raise TypeError(f"{options.title}.loss_type must be a list of loss types, got {kinds!r}")
    kinds = [Options({"loss_type": kind}, options.title).choice("loss_type", known) for kind in kinds]
    given = options.get("loss_weights")
    weights = [1.0] * len(kinds) if not given else list(given)
    if len(weights) != len(kinds):
        raise ValueError(f"{options.title}.loss_weights must have one weight for each of {kinds}, got {given!r}")
    return kinds, [Options({"loss_weights": x}, options.title).number("loss_weights", Number) for x in weights]


def _divergence(options: Options, ratio: Score) -> Score:
    """What pairs are compared by."""
    scores: dict[str, Callable[[], Score]] = {
        "reverse_kl": lambda: ratio,
        "forward_kl": lambda: ForwardKL(ratio),
        "js_divergence": lambda: JensenShannon(ratio),
        "alpha_divergence": lambda: AlphaDivergence(options.number("f_alpha_divergence_coef", NonNegative), ratio),
    }
    return options.choice("f_divergence_type", scores)()


def _preference(options: Options, kind: str, beta: float, ratio: SequenceRatio, score: Score) -> Objective:
    """The objective of a loss type."""
    if kind in ("sigmoid_norm", "ipo"):
        score = LengthMean(score)
    objective = _PREFERENCES[kind]
    given: dict[str, Any] = {"beta": beta, "score": score}
    if kind in ("exo_pair", "robust", "aot", "aot_unpaired"):
        given["smoothing"] = options.number("label_smoothing", Below1Half)
        if kind == "exo_pair" and not given["smoothing"]:
            raise ValueError(f"{options.title}.label_smoothing must be positive with exo_pair, got 0.0")
    if kind == "discopop":
        given["tau"] = options.number("discopop_tau", Positive)
    return objective(**given)


@dataclass(frozen=True)
class SequenceRatio(Score):
    """R = log pi / pi_ref of the sequence; tokens beyond the pair's shorter sequence times alpha.

    Args:
        alpha: in [0, 1]; None: all tokens alike.
        reference: the field with log pi_ref of whole sequences, [S], with the same alpha in it; None: ``ref_logp``.
    """

    alpha: Share | None = None
    reference: Field | None = None

    def __call__(self, t: Any) -> Tensor:
        if self.reference is None:
            return self.summed(t, t.logp - t.ref_logp)
        return self.summed(t, t.logp) - self.of_reference(t)

    def of_reference(self, t: Any) -> Tensor:
        """log pi_ref of each sequence."""
        return self.summed(t, t.ref_logp) if self.reference is None else t.sequence_field(self.reference)

    def summed(self, t: Any, x: Tensor) -> Tensor:
        """Sum of [T] values over each sequence."""
        if self.alpha is None:
            return t.sequence_sum(x)
        chosen, rejected = t.pairs(torch.arange(t.n_sequences, device=x.device))
        shorter = torch.minimum(t.lengths[chosen], t.lengths[rejected])
        shared = torch.empty_like(t.lengths).index_put((chosen,), shorter).index_put((rejected,), shorter)
        return t.sequence_sum(torch.where(t.positions < t.to_tokens(shared), x, self.alpha * x))


@dataclass(frozen=True)
class PolicyPart(Score):
    """log pi of the sequence.

    Args:
        of: the log-ratio that it is part of.
    """

    of: SequenceRatio

    def __call__(self, t: Any) -> Tensor:
        return self.of.summed(t, t.logp)


@dataclass(frozen=True)
class SortedMargins(AOT):
    """``AOT`` with any log-ratio of sequences."""

    score: SequenceRatio = SequenceRatio()

    def __call__(self, t: Any) -> Tensor:
        margins = (of_chosen - of_rejected for of_chosen, of_rejected in map(t.pairs, self._parts(t)))
        ours, theirs = (torch.sort(x).values for x in margins)
        return self._smoothed(ours - theirs)

    def _parts(self, t: Any) -> tuple[Tensor, Tensor]:
        return PolicyPart(self.score)(t), self.score.of_reference(t)


_PREFERENCES: dict[str, Callable[..., Objective]] = {
    "sigmoid": DPO,
    "hinge": Hinge,
    "ipo": IPO,
    "exo_pair": EXO,
    "nca_pair": NCA,
    "robust": RobustDPO,
    "bco_pair": BCOPair,
    "sppo_hard": SPPOHard,
    "aot": SortedMargins,
    "aot_unpaired": AOTUnpaired,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "discopop": DiscoPOP,
    "sigmoid_norm": DPO,
}


@dataclass(frozen=True)
class PairConfidence(Parameters):
    """w(o+) w(o-), w = exp(mean log pi - log sum_j p_j^2) without a gradient: WPO.

    Field ``log_sum_sq_probs``: of pi, as ``token_observations`` gives it.

    Source: Zhou et al. 2024 (arXiv:2406.11827), eq. 2.
    """

    scope = "pair"

    def __call__(self, t: Any) -> Tensor:
        chosen, rejected = t.pairs(torch.exp(t.sequence_mean(t.logp - t.log_sum_sq_probs)))
        return chosen * rejected


@dataclass(frozen=True)
class ChosenTokenMean:
    """Mean over the tokens of the chosen sequences."""

    def weights(self, batch: Batch) -> Tensor:
        is_chosen = torch.zeros(batch.n_sequences, dtype=torch.bool, device=batch.target.device)
        batch.split_pairs(is_chosen)[0].fill_(True)
        counted = batch.valid & batch.per_token(is_chosen)
        return counted.double() / counted.sum().clamp(min=1)


def kto(options: Options) -> Loss:
    """The loss of a KTOConfig; see ``trl.loss``."""
    check_router_loss(options)
    beta = options.number("beta", Positive)
    desirable, undesirable = (options.number(f"{name}_weight", NonNegative) for name in ("desirable", "undesirable"))
    score = LogRatio(PRECOMPUTED if options.flag("precompute_ref_log_probs") else None)
    objectives: dict[str, Objective] = {
        "kto": KTO(beta, desirable, undesirable, score),
        "apo_zero_unpaired": Scaled(APOZeroUnpaired(beta, score), LabelWeight(desirable, undesirable)),
    }
    objective = options.choice("loss_type", objectives)
    return Loss(Logged(objective, JudgedLog(beta, score, options.get("loss_type") == "kto")), SequenceMean())


@dataclass(frozen=True)
class LabelWeight(Parameters):
    """One weight for desirable sequences, field ``label``, another for the others.

    Args:
        desirable, undesirable: the weights, >= 0.
    """

    desirable: NonNegative
    undesirable: NonNegative

    scope = "sequence"

    def __call__(self, t: Any) -> Tensor:
        good = t.to_tokens(t.sequence_field("label") != 0)
        return torch.where(good, self.desirable, self.undesirable).to(t.logp.dtype)


def sft(options: Options) -> Loss:
    """The loss of an SFTConfig; see ``trl.loss``."""
    check_router_loss(options)
    objective: Objective = options.choice("loss_type", {"nll": SFT(), "chunked_nll": SFT(), "dft": DFT()})
    # Where DFT is trained TRL has no label smoothing.
    if not isinstance(objective, DFT) and options.number("label_smoothing_factor", NonNegative):
        raise options.refused(
            "label_smoothing_factor", "it needs the log-probability of every column; set 0.0 or keep TRL's loss"
        )
    over_processes = options.flag("average_tokens_across_devices")
    return Loss(objective, TokensOfStep(options.number("world_size", Positive) if over_processes else 1.0))
