"""``integrations.trl.fuse``: the loss of TRL's GRPOTrainer in one pass of its model's head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.batch import IGNORE, Batch
from unirl_kernels.integrations.losses.trl import loss as loss_of
from unirl_kernels.integrations.one_pass import OnePass
from unirl_kernels.objectives import Loss

OPTIONS = {
    "loss_type": "loss_type",
    "beta": "beta",
    "epsilon_low": "epsilon",
    "importance_sampling_level": "importance_sampling_level",
    "top_entropy_quantile": "top_entropy_quantile",
    "off_policy_mask_threshold": "off_policy_mask_threshold",
    "max_completion_length": "max_completion_length",
    "use_vllm": "use_vllm",
    "vllm_importance_sampling_correction": "vllm_importance_sampling_correction",
    "use_adaptive_entropy": "use_adaptive_entropy",
}
"""Attributes that GRPOTrainer's loss reads, and the options that they are made of."""


class OnePassGRPO:
    """The loss of a GRPOTrainer, and what it logs, from one pass.

    The trainer's own ``_compute_loss`` runs on the log-probabilities and entropies that the pass returns, without a
    gradient: it logs what it always logs. The loss and its gradient are those of the pass.

    Args:
        trainer: a GRPOTrainer.

    Raises:
        TypeError: when the trainer is of another class, or one that computes its loss otherwise.
        RuntimeError, ValueError: when one pass cannot make what the configuration asks for.
    """

    def __init__(self, trainer: Any) -> None:
        _check(trainer)
        self._trainer = trainer
        self._losses = {1.0: loss_of(trainer.args)}

    def compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """What takes the place of the trainer's ``_compute_loss``."""
        trainer = self._trainer
        _check_options(trainer)
        training = trainer.model.training
        steps = trainer.args.gradient_accumulation_steps
        factor = steps / (trainer.current_gradient_accumulation_steps if training else 1)
        work = OnePass(self._loss(factor), _batch_of(trainer, inputs, training))
        score = trainer._get_per_token_logps_and_entropies

        def scored(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None]:
            with work.awaited():
                logp, entropy, _ = score(*args, **kwargs)
            logp = logp.detach()
            if "tool_mask" in inputs and inputs.get("old_per_token_logps") is not None:
                # Not scored here. A ratio of 0 probability would be inf, and what is logged NaN.
                logp = torch.where(inputs["tool_mask"] == 0, inputs["old_per_token_logps"], logp)
            return logp, entropy.detach(), None

        trainer._get_per_token_logps_and_entropies = scored
        try:
            type(trainer)._compute_loss(trainer, model, inputs)
        finally:
            del trainer._get_per_token_logps_and_entropies
        return work.loss

    def _loss(self, factor: float) -> Loss:
        if factor not in self._losses:
            self._losses[factor] = factor * self._losses[1.0]
        return self._losses[factor]


def _batch_of(trainer: Any, inputs: Mapping[str, Any], training: bool) -> Callable[[Tensor], Batch]:
    """Makes the batch of the completions' tokens, packed, of their targets."""
    scored = inputs["completion_mask"] != 0
    at = scored.reshape(-1).nonzero().squeeze(-1)  # found once: finding them waits for an accelerator

    def flat(x: Tensor) -> Tensor:
        return x.reshape(-1)[at]

    def given(name: str) -> Tensor | None:
        return None if inputs.get(name) is None else flat(inputs[name])

    def batch(targets: Tensor) -> Batch:
        if (tools := given("tool_mask")) is not None:
            targets = targets.masked_fill(tools == 0, IGNORE)
        lengths = scored.sum(1, dtype=torch.int32)
        ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        advantages = inputs["advantages"]
        fields = {}
        if (rollout := given("sampling_per_token_logps")) is not None:
            fields["rollout_logp"] = rollout
        if (count := inputs.get("num_items_in_batch")) is not None:
            # In evaluation a batch is neither split nor accumulated.
            fields["num_items_in_batch"] = count if training else count * trainer.args.steps_per_generation
        if trainer.use_adaptive_entropy:
            acts = trainer._last_world_entropy <= trainer.args.entropy_target
            fields["entropy_coef"] = torch.tensor(trainer.entropy_coef if acts else 0.0, device=targets.device)
        return Batch(
            targets,
            advantages if advantages.dim() == 1 else flat(advantages),
            given("old_per_token_logps"),
            given("ref_per_token_logps") if trainer.beta else None,
            ends,
            fields=fields,
        )

    return batch


def _check(trainer: Any) -> None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from trl import GRPOTrainer

    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(
            f"trainer must be a GRPOTrainer of TRL, got {type(trainer).__name__}: patch() is for the others"
        )
    for name in ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies"):
        if getattr(type(trainer), name) is not getattr(GRPOTrainer, name):
            raise TypeError(
                f"trainer must compute its loss as GRPOTrainer, got {type(trainer).__name__} with its own {name}"
            )
    args = trainer.args
    if is_deepspeed_zero3_enabled():
        raise ValueError("trainer must not run DeepSpeed's ZeRO-3, which partitions the head's weight: use ZeRO-2")
    if args.n_gpu > 1:
        raise ValueError(f"trainer.args.n_gpu must be at most 1 (no DataParallel), got {args.n_gpu}: launch processes")
    if args.torch_compile:
        raise ValueError("trainer.args.torch_compile must be False: the loss is made inside of the model's forward")
    if trainer.aux_loss_enabled:
        raise ValueError("trainer.args.router_aux_loss_coef must be 0.0: the model computes the routers' loss")
    threshold = args.off_policy_mask_threshold
    if threshold is not None and not args.use_vllm and trainer.rollout_func is not None:
        raise ValueError(
            f"trainer.args.off_policy_mask_threshold={threshold} goes by the log-probabilities of rollout_func, which "
            "one pass would not read: set it to None, or use_vllm=True"
        )
    _check_options(trainer)


def _check_options(trainer: Any) -> None:
    """The loss is made of the configuration; TRL's own reads the trainer, which somebody may have changed."""
    for name, option in OPTIONS.items():
        value, expected = getattr(trainer, name), getattr(trainer.args, option)
        if value != expected:
            raise ValueError(f"trainer.{name} must be trainer.args.{option} = {expected!r}, got {value!r}")
    if not trainer.use_adaptive_entropy and trainer.entropy_coef != trainer.args.entropy_coef:
        raise ValueError(
            f"trainer.entropy_coef must be trainer.args.entropy_coef = {trainer.args.entropy_coef!r}, "
            f"got {trainer.entropy_coef!r}"
        )
