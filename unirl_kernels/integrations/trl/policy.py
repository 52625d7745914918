"""The losses of TRL's GRPOConfig and RLOOConfig."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unirl_kernels.integrations.options import Options
from unirl_kernels.integrations.rules import FieldWeight, Logged, Scored, TokensOfStep, WithField
from unirl_kernels.integrations.trl.logs import CISPOLog, NoLog, SequenceClips, TokenClips, Value, VESPOLog
from unirl_kernels.objectives import (
    CISPO,
    GSPO,
    K3,
    RLOO,
    SAPO,
    VESPO,
    Aggregation,
    BatchNormalized,
    Clip,
    Entropy,
    FixedLength,
    IcePop,
    ImportanceWeighted,
    Loss,
    Objective,
    OffPolicyMask,
    Scaled,
    SequenceCISPO,
    SequenceIcePop,
    SequenceImportanceWeighted,
    SequenceMean,
    SequenceSAPO,
    SequenceTruncatedRatio,
    SequenceTwoSidedClip,
    TokenMean,
    TopEntropy,
    TruncatedRatio,
    TwoSidedClip,
)
from unirl_kernels.objectives.arguments import AboveOne, NonNegative, Positive, Share
from unirl_kernels.objectives.compose import Rule

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types with PPO's clip."""

ROLLOUT_WEIGHT = "rollout_weight"
"""The field with the weights of vLLM's samples, where they are computed from ``rollout_logp``."""

LEVELS = {"token": False, "sequence": True}


def grpo(options: Options, rollout_weight: str | None = None) -> Loss:
    """The loss of a GRPOConfig; see ``trl.loss``.

    Args:
        options: those of the configuration.
        rollout_weight: a field with the weights of vLLM's samples; None: they are computed from ``rollout_logp``.
    """
    check_router_loss(options)
    kind = options.choice("loss_type", {name: name for name in (*CLIPPED, "cispo", "sapo", "vespo")})
    by_sequence = options.choice("importance_sampling_level", LEVELS)
    aggregation = _aggregation(options, kind)
    entropy_mask = _entropy_mask(options)
    corrected = _corrects(options)

    of_rollout = _rollout_rule(options, kind == "vespo") if corrected else None

    surrogate, log = _surrogate(options, kind, by_sequence, rollout_weight)
    if kind == "vespo" and of_rollout is not None and rollout_weight is None:
        surrogate = WithField(surrogate, ROLLOUT_WEIGHT, of_rollout)
        log = VESPOLog(surrogate)
    masks: list[Rule] = [*_off_policy_mask(options), *([] if entropy_mask is None else [entropy_mask])]
    if kind != "vespo" and of_rollout is not None:
        masks.append(of_rollout if rollout_weight is None else FieldWeight(rollout_weight))
    for mask in masks:
        surrogate = Scaled(surrogate, mask)
    loss = Loss(surrogate if log is None else Logged(surrogate, log), aggregation)

    if beta := options.number("beta", NonNegative):
        loss = loss + beta * Loss(_penalty(options, by_sequence), aggregation)
    loss = loss + _bonus(options, entropy_mask)
    steps = options.number("gradient_accumulation_steps", Positive)
    # The types with a count of tokens have the accumulation in it.
    return loss if steps == 1 else 1 / steps * loss


def rloo(options: Options) -> Loss:
    """The loss of an RLOOConfig; see ``trl.loss``."""
    check_router_loss(options)
    low, high = _clip(options)
    return Loss(Logged(RLOO(low, high), SequenceClips(low, high, summed=True)), SequenceMean())


def check_router_loss(options: Options) -> None:
    """Refuse what the model adds to the loss."""
    if options.optional("router_aux_loss_coef", NonNegative):
        raise options.refused(
            "router_aux_loss_coef", "the model computes the routers' loss; set it to 0.0 or None, and add that loss"
        )


def _clip(options: Options) -> tuple[float, float]:
    low = options.number("epsilon", Share)
    high = options.optional("epsilon_high", NonNegative)
    return low, low if high is None else high


def _surrogate(
    options: Options, kind: str, by_sequence: bool, rollout_weight: str | None
) -> tuple[Objective, Rule | None]:
    """The objective of a loss type, and what it logs."""
    if kind in CLIPPED:
        (low, high), delta = _clip(options), options.optional("delta", AboveOne)
        objective: Objective
        if by_sequence:
            objective = GSPO(low, high) if delta is None else SequenceTwoSidedClip(low, high, delta)
            return objective, SequenceClips(low, high, delta)
        objective = Clip(low, high) if delta is None else TwoSidedClip(low, high, delta)
        return objective, TokenClips(low, high, delta)
    if kind == "cispo":
        name = "epsilon" if options.get("epsilon_high") is None else "epsilon_high"
        upper = options.number(name, NonNegative)
        return (SequenceCISPO if by_sequence else CISPO)(0.0, upper), CISPOLog(upper, by_sequence)
    if kind == "sapo":
        positive, negative = (options.number(f"sapo_temperature_{sign}", Positive) for sign in ("pos", "neg"))
        return (SequenceSAPO if by_sequence else SAPO)(positive, negative), NoLog()
    (k_up, lambda_up), (k_down, lambda_down) = (
        (options.number(f"vespo_k_{sign}", NonNegative), options.number(f"vespo_lambda_{sign}", NonNegative))
        for sign in ("pos", "neg")
    )
    weight = (rollout_weight or ROLLOUT_WEIGHT) if _corrects(options) else None
    # TRL keeps the lambdas from 0.
    vespo = VESPO(k_up, max(lambda_up, 1e-4), k_down, max(lambda_down, 1e-4), weight)
    return vespo, VESPOLog(vespo)


def _corrects(options: Options) -> bool:
    return options.flag("use_vllm") and options.flag("vllm_importance_sampling_correction")


def _aggregation(options: Options, kind: str) -> Aggregation:
    if kind in ("grpo", "sapo"):
        return SequenceMean()
    if kind == "bnpo":
        return TokenMean()
    if kind == "luspo":
        return FixedLength(1)
    if kind == "dr_grpo":
        return FixedLength(options.number("max_completion_length", Positive))
    # The count is of a generation batch, of all processes.
    processes, steps = (options.number(name, Positive) for name in ("world_size", "steps_per_generation"))
    return TokensOfStep(processes * steps)


def _entropy_mask(options: Options) -> TopEntropy | None:
    share = options.number("top_entropy_quantile", Share)
    if share == 1:
        return None
    if options.number("world_size") > 1:
        raise options.refused(
            "top_entropy_quantile", "the quantile is over the tokens of all processes, and a loss sees its own; set 1.0"
        )
    return TopEntropy(share)


def _off_policy_mask(options: Options) -> list[Rule]:
    delta = options.optional("off_policy_mask_threshold", Positive)
    if delta is None:
        return []
    if options.flag("use_vllm"):
        return [Scored(OffPolicyMask(delta, "rollout_logp"), "logp")]
    return [OffPolicyMask(delta, "old_logp")]


def _rollout_rule(options: Options, of_vespo: bool) -> Rule:
    """The weight of vLLM's samples."""
    modes: dict[str, Callable[..., Rule]] = {
        "token_truncate": TruncatedRatio,
        "token_mask": IcePop,
        "sequence_truncate": SequenceTruncatedRatio,
        "sequence_mask": SequenceIcePop,
    }
    if of_vespo:
        modes = {name: rule for name, rule in modes.items() if name.startswith("token")}
    rule = options.choice("vllm_importance_sampling_mode", modes)
    low = options.optional("vllm_importance_sampling_clip_min", NonNegative)
    high = options.optional("vllm_importance_sampling_clip_max", NonNegative)
    if of_vespo:
        # TRL adds the log-ratio of padding, too, which is 0 only inside the bounds.
        for name, inside in (("min", low is None or low <= 1), ("max", high is None or high >= 1)):
            if not inside:
                raise options.refused(f"vllm_importance_sampling_clip_{name}", "vespo needs 1 within the bounds")
    return Scored(rule(low=0.0 if low is None else low, high=math.inf if high is None else high))


def _penalty(options: Options, by_sequence: bool) -> Objective:
    if not options.flag("use_bias_correction_kl"):
        return K3()
    penalty = SequenceImportanceWeighted(K3()) if by_sequence else ImportanceWeighted(K3())
    return Logged(penalty, Value("kl", penalty))


def _bonus(options: Options, mask: TopEntropy | None) -> Any:
    """The entropy bonus, a loss; 0 for none."""
    adaptive = options.flag("use_adaptive_entropy")
    coefficient = options.number("entropy_coef")
    if not adaptive and coefficient == 0:
        return 0
    bonus: Objective = Entropy() if mask is None else Scaled(Entropy(), BatchNormalized(mask))
    bonus = Logged(bonus, NoLog())
    return -1.0 * Loss(Adaptive(bonus), TokenMean()) if adaptive else -coefficient * Loss(bonus, TokenMean())


@dataclass(frozen=True)
class Adaptive(Objective):
    """c f, c the field ``entropy_coef``.

    Args:
        objective: f.
    """

    objective: Objective

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scope", self.objective.scope)

    def __call__(self, t: Any) -> Tensor:
        return t.entropy_coef * self.objective(t)
