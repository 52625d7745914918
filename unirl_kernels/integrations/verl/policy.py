"""verl's policy losses, by ``loss_mode``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.integrations.options import Options
from unirl_kernels.integrations.rules import Logged
from unirl_kernels.integrations.verl.logs import (
    BOUND,
    ZERO,
    AbsoluteLog,
    ActorLog,
    GeoMeanLog,
    TrustLog,
)
from unirl_kernels.integrations.verl.rollout import (
    GeometricMean,
    Kept,
    importance_weight,
    rejection,
)
from unirl_kernels.objectives import (
    CISPO,
    GMPO,
    K2,
    SAPO,
    Aggregation,
    ClipCov,
    DualClip,
    GSPOToken,
    KLCov,
    Loss,
    Objective,
    Reinforce,
    Scaled,
    SequenceMean,
    TrustKL,
    TrustTV,
)
from unirl_kernels.objectives.arguments import AboveOne, NonNegative, Number, Positive, Share
from unirl_kernels.objectives.compose import Rule


class Policy:
    """The policy loss of an actor's configuration.

    Args:
        options: of the actor.
        aggregation: of ``loss_agg_mode``.
        averaged: the mean over sequences, which ``sapo`` has always; None where its count is missing.
        weight: of the samples, computed before; None for none.
    """

    def __init__(
        self, options: Options, aggregation: Aggregation, averaged: Aggregation | None, weight: Rule | None
    ) -> None:
        self._options, self._own = options, options.part("policy_loss")
        self._aggregation, self._averaged, self._weight = aggregation, averaged, weight

    def loss(self, mode: str | None = None) -> Loss:
        """The loss of a mode; None: that of the configuration."""
        modes: dict[str, Callable[[], Loss]] = {
            "vanilla": self.vanilla,
            "dppo_tv": lambda: self.dppo(TrustTV),
            "dppo_kl": lambda: self.dppo(TrustKL),
            "gspo": self.gspo,
            "sapo": self.sapo,
            "gpg": lambda: self._weighted(Reinforce(), NothingLogged()),
            "clip_cov": self.clip_cov,
            "kl_cov": self.kl_cov,
            "geo_mean": self.geo_mean,
            "dro": self.dro,
            "cispo": self.cispo,
            "bypass_mode": lambda: self.bypass(self._own.part("rollout_correction")),
        }
        chosen = self._own.choice("loss_mode", modes) if mode is None else modes[mode]
        return chosen()

    def _weighted(self, objective: Objective, log: Any, aggregation: Aggregation | None = None) -> Loss:
        if self._weight is not None:
            objective = Scaled(objective, self._weight)
        return Loss(Logged(objective, log), self._aggregation if aggregation is None else aggregation)

    def _bounds(self, low_kind: Any = Share, high_kind: Any = NonNegative) -> tuple[float, float]:
        """``clip_ratio_low`` and ``clip_ratio_high``; ``clip_ratio`` where they are None."""
        found = []
        for name, kind in (("clip_ratio_low", low_kind), ("clip_ratio_high", high_kind)):
            value = self._options.optional(name, kind)
            found.append(self._options.number("clip_ratio", kind) if value is None else value)
        return found[0], found[1]

    def _dual_clip(self) -> DualClip:
        return DualClip(*self._bounds(), self._options.number("clip_ratio_c", AboveOne))

    def vanilla(self) -> Loss:
        objective = self._dual_clip()
        return self._weighted(objective, ActorLog(objective, "clip_fraction", "clip_fraction/dual", BOUND))

    def dppo(self, trust: Callable[..., Rule]) -> Loss:
        low, high = self._bounds(*((Share, Share) if trust is TrustTV else (NonNegative, NonNegative)))
        most = self._options.number("clip_ratio_c", Positive)
        objective = Scaled(CISPO(0.0, most), trust(low, high))
        return self._weighted(objective, TrustLog(objective, "masked_fraction", None, BOUND, most=most))

    def gspo(self) -> Loss:
        objective = GSPOToken(*self._bounds(), bound=10.0)
        return self._weighted(objective, ActorLog(objective, "clip_fraction", ZERO))

    def sapo(self) -> Loss:
        if self._averaged is None:
            raise ValueError(f"{self._options.title}.global_batch_info must have global_batch_size with 'sapo'")
        positive, negative = (self._options.number(name, Positive) for name in ("tau_pos", "tau_neg"))
        objective = SAPO(positive, negative)
        return self._weighted(objective, ActorLog(objective, ZERO, ZERO, BOUND), self._averaged)

    def clip_cov(self) -> Loss:
        bounds = (self._default("clip_cov_lb", 1.0, Number), self._default("clip_cov_ub", 5.0, Number))
        share = self._default("clip_cov_ratio", 2e-4, Positive)
        objective = SampledClipCov(*self._bounds(), *bounds, share)
        return self._weighted(objective, ActorLog(objective, "clip_fraction"))

    def kl_cov(self) -> Loss:
        share, coefficient = self._default("kl_cov_ratio", 2e-4, Share), self._default("ppo_kl_coef", 1.0, NonNegative)
        if not share:
            raise ValueError(f"{self._own.title}.kl_cov_ratio must be positive, got {share}")
        return self._weighted(KLCov(share, coefficient), AbsoluteLog())

    def _default(self, name: str, value: float, kind: Any) -> float:
        """An option of the policy loss; verl's own default where it is None."""
        given = self._own.optional(name, kind)
        return value if given is None else given

    def geo_mean(self) -> Loss:
        low, high = self._bounds(NonNegative, NonNegative)
        objective: Objective = GMPO(low, high)
        if self._weight is not None:
            objective = Scaled(objective, GeometricMean(self._weight))
        # verl takes the mean over all sequences of the batch, whatever loss_agg_mode says.
        return Loss(Logged(objective, GeoMeanLog(low, high)), SequenceMean())

    def dro(self) -> Loss:
        beta = self._own.number("dro_beta", Positive)
        objective = PenalizedReinforce(beta)
        return self._weighted(objective, ActorLog(objective))

    def cispo(self) -> Loss:
        low, high = self._bounds()
        objective = CISPO(1 - low, 1 + high)
        return self._weighted(objective, ActorLog(objective, "clip_fraction", ZERO, BOUND))

    def bypass(self, correction: Options) -> Loss:
        """pi_old is the policy that sampled; weights and rejections are those of pi, within the loss.

        Args:
            correction: of a RolloutCorrectionConfig.
        """
        clips = correction.choice("loss_type", {"ppo_clip": True, "reinforce": False})
        rejected, weight = rejection(correction), importance_weight(correction)
        objective: Objective
        if clips:
            # The ratio of the clip is the correction: verl computes the weight for its log alone.
            objective = self._dual_clip()
            log = ActorLog(objective, "clip_fraction", "clip_fraction/dual", BOUND, rejected)
        else:
            objective = Reinforce()
            log = ActorLog(objective, kept=rejected)
            if weight is not None:
                objective = Scaled(objective, weight)
        if rejected is not None:
            objective = Scaled(objective, Kept(rejected, self._aggregation))
        return Loss(Logged(objective, log), self._aggregation)


@dataclass(frozen=True)
class NothingLogged:
    """Logs nothing."""

    def __call__(self, t: Any) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class PenalizedReinforce(Objective):
    """-A log pi + beta / 2 (log pi / pi_old)^2.  Richemond et al. 2024 (DRO, arXiv:2405.19107); verl ``dro``.

    Args:
        beta: > 0.
    """

    beta: Positive

    def __call__(self, t: Any) -> Tensor:
        return Reinforce()(t) + self.beta * K2("old_logp")(t)


@dataclass(frozen=True)
class SampledClipCov(ClipCov):
    """``ClipCov`` of a random share of its tokens: those with the smallest values of the field ``random``.

    Args:
        share: of all tokens, > 0; at least one.
    """

    share: Positive = 2e-4

    def _left_out(self, t: Any) -> Tensor:
        found = super()._left_out(t) & t.valid
        n = (t.valid.sum().double() * self.share).floor().long().clamp(min=1, max=len(found))
        order = torch.sort(torch.where(found, t.random, torch.inf)).values
        return found & (t.random <= order.gather(0, (n - 1).reshape(1)))
