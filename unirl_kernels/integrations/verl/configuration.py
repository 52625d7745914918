"""``integrations.verl.loss``: the loss that an actor's configuration of verl means."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unirl_kernels.batch import Batch
from unirl_kernels.integrations.options import Options
from unirl_kernels.integrations.rules import FieldWeight
from unirl_kernels.integrations.verl.policy import Policy
from unirl_kernels.integrations.versions import check_release
from unirl_kernels.objectives import (
    K1,
    K2,
    AbsoluteKL,
    Aggregation,
    Entropy,
    FixedLength,
    Loss,
    LowVarianceKL,
    Objective,
    SequenceMean,
    StraightThrough,
    TokenMean,
)
from unirl_kernels.objectives.arguments import Number, Positive

TRIED = "0.9"
"""The release that these losses reproduce."""

WEIGHTS = "rollout_is_weights"
"""The field with the weights that verl's trainer computes."""


def loss(actor_config: Any, rollout_correction: Any = None) -> Loss:
    """The loss of an actor's configuration of verl: what verl's ``ppo_loss`` returns for a micro-batch.

    It takes an ActorConfig of verl 0.9, a subclass, or a mapping with all its options. Those of verl's YAML files have
    not all: convert them with ``omega_conf_to_dataclass``. Targets are verl's responses, padded or packed, with
    ``IGNORE`` where ``response_mask`` is 0.

    Besides ``target`` the batch needs:

    =================================  =============================  ==========================================
    configuration                      where                          what, by verl's name
    =================================  =============================  ==========================================
    any                                ``advantage``                  ``advantages``
    any                                ``old_logp``                   ``old_log_probs``; in bypass mode
                                                                      ``rollout_log_probs``
    ``use_kl_loss``                    ``ref_logp``                   ``ref_log_prob``
    ``rollout_correction`` with        ``rollout_is_weights``         the same, which verl's trainer computes of
    ``rollout_is``, no bypass mode                                    ``old_log_probs`` and ``rollout_log_probs``
    ``clip_cov``                       ``random``                     random numbers of tokens, which choose what
                                                                      is left out
    =================================  =============================  ==========================================

    verl removes tokens that it rejects before the step (``rollout_rs``, no bypass mode) from ``response_mask``: they
    are ``IGNORE``.

    ``actor_config.global_batch_info`` is read when the loss is made, as verl's losses do at each step: ``dp_size``,
    ``batch_num_tokens``, ``global_batch_size``; numbers or 0-dim tensors. Without them the counts are those of the
    batch. ``loss_agg_mode="seq-mean-token-sum-norm"`` without ``loss_scale_factor`` divides by the padded length of the
    target. This must be the length of verl's responses; packed targets are refused.

    ``out.metrics`` has ``actor/ppo_kl``, ``actor/pg_clipfrac``, ``actor/pg_clipfrac_lower`` where verl logs them.
    ``out.terms`` is the policy loss, minus ``entropy_coeff`` times the entropy loss, and ``kl_loss_coef`` times the
    penalty, so ``actor/pg_loss``, ``actor/entropy_loss`` and ``kl_loss`` are terms divided by their coefficients.
    ``rollout_corr/...`` of bypass mode is missing; verl's own function computes it from ``out.logp``.

    Differences from verl: log-ratios are bounded by 40; verl bounds them by 20 or not at all, and in ``gspo`` also from
    below by -10 (values differ by less than 5e-5 of the advantage). The loss of a batch without a valid token is 0, not
    NaN. ``geo_mean`` gives a gradient to tokens of advantage 0 if other tokens of the sequence have an advantage.

    Args:
        actor_config: the actor's configuration.
        rollout_correction: ``algorithm.rollout_correction``, or None. With ``bypass_mode`` it determines the loss.
            ``policy_loss`` of the actor must then say the same, since verl's workers read that: ``loss_mode`` is
            ``bypass_mode``, and it has this correction. verl's trainer with ``use_v1`` sets neither.

    Returns:
        The loss.

    Raises:
        ImportError: when verl is not installed. Another release gives a warning, see ``integrations.versions``.
        TypeError: when the configuration lacks an option, or an option has another type.
        ValueError: when an option has an unknown value, is outside its range, or cannot be expressed as a loss: the
            penalty ``full``, weights normalised over several processes, a policy loss that is not verl's own, a bypass
            mode that the actor's ``loss_mode`` does not have.
    """
    check_release("verl", TRIED, TRIED)
    options = Options(actor_config, "ActorConfig")
    counts = _counts(options)
    aggregation = _aggregations(options, *counts)
    correction = None if rollout_correction is None else Options(rollout_correction, "RolloutCorrectionConfig")
    averaged = None if _lacks(counts[1], counts[2]) else SequenceMean(counts[1], empty="skip")
    if correction is not None and correction.flag("bypass_mode"):
        found = _bypass(options, Policy(options, aggregation, averaged, None), correction)
    else:
        known = {None: None, "token": FieldWeight(WEIGHTS), "sequence": FieldWeight(WEIGHTS)}
        weight = None if correction is None else correction.choice("rollout_is", known)
        found = Policy(options, aggregation, averaged, weight).loss()
    if coefficient := options.number("entropy_coeff", Number):
        found = found - coefficient * Loss(Entropy(), aggregation)
    if options.flag("use_kl_loss"):
        found = found + options.number("kl_loss_coef", Number) * Loss(_penalty(options), aggregation)
    return found


def _bypass(options: Options, policy: Policy, correction: Options) -> Loss:
    """The loss of bypass mode. verl's workers know the actor's configuration alone, so that it must say the same."""
    own, found = options.part("policy_loss"), policy.bypass(correction)
    if own.get("loss_mode") != "bypass_mode":
        raise own.refused(
            "loss_mode", "rollout_correction.bypass_mode wants 'bypass_mode', and workers read this option"
        )
    if own.get("rollout_correction") is None or policy.bypass(own.part("rollout_correction")) != found:
        raise own.refused("rollout_correction", "it must be the given rollout_correction, since workers read this one")
    return found


def _counts(options: Options) -> tuple[Any, Any, Any]:
    """Tokens and sequences of the whole step for each process, None where they are not given, and the processes."""
    given = options.get("global_batch_info")
    found = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, **dict(given)}
    for name, value in found.items():
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{options.title}.global_batch_info[{name!r}] must be positive, got {value!r}")
    processes = found["dp_size"]
    tokens, sequences = (
        None if found[name] is None else found[name] / processes for name in ("batch_num_tokens", "global_batch_size")
    )
    return tokens, sequences, processes


def _aggregations(options: Options, tokens: Any, sequences: Any, processes: Any) -> Aggregation:
    """The aggregation of ``loss_agg_mode``."""
    needed = {"token-mean": ("batch_num_tokens", tokens), "token-sum": ("", 1)}
    modes: dict[str, Callable[[], Aggregation]] = {
        "token-mean": lambda: TokenMean(tokens),
        "token-sum": lambda: TokenMean(1 / processes),
        "seq-mean-token-sum": lambda: FixedLength(1, sequences, empty="skip"),
        "seq-mean-token-sum-norm": lambda: _normed(options, sequences),
        "seq-mean-token-mean": lambda: SequenceMean(sequences, empty="skip"),
    }
    chosen = options.choice("loss_agg_mode", modes)
    mode = options.get("loss_agg_mode")
    name, count = needed.get(mode, ("global_batch_size", sequences))
    if _lacks(count, processes):
        raise ValueError(f"{options.title}.global_batch_info must have {name} with dp_size={processes} and {mode!r}")
    return chosen()


def _lacks(count: Any, processes: Any) -> bool:
    """Whether several processes have no common count."""
    return count is None and not (isinstance(processes, numbers.Real) and processes == 1)


def _normed(options: Options, sequences: Any) -> Aggregation:
    length = options.optional("loss_scale_factor", Positive)
    return PaddedLength(sequences) if length is None else FixedLength(length, sequences, empty="skip")


@dataclass(frozen=True)
class PaddedLength:
    """``FixedLength`` whose length is that of the padded target.

    Args:
        count: as in ``FixedLength``.
    """

    count: float | Tensor | None = None

    def weights(self, batch: Batch) -> Tensor:
        if batch.cu_seqlens is not None:
            raise ValueError(
                "ActorConfig.loss_scale_factor must be set for packed targets with 'seq-mean-token-sum-norm', got None"
            )
        return FixedLength(batch.target.shape[-1], self.count, empty="skip").weights(batch)


def _penalty(options: Options) -> Objective:
    """The penalty of ``kl_loss_type``."""
    own: dict[tuple[str, ...], Objective] = {
        ("kl", "k1"): K1(),
        ("abs",): AbsoluteKL(),
        ("mse", "k2"): K2(),
        ("low_var_kl", "k3"): LowVarianceKL(),
    }
    plain = {name: x for names, x in own.items() for name in names}
    # With a + the gradient is that of k2.
    known = plain | {f"{name}+": x if x == K2() else StraightThrough(x, K2()) for name, x in plain.items()}
    if options.get("kl_loss_type") == "full":
        raise options.refused("kl_loss_type", "it needs the whole distributions, and verl has none; set 'low_var_kl'")
    return options.choice("kl_loss_type", known)
