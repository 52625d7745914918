"""``integrations.trl.fuse``: what it needs of any trainer of TRL, and the losses of GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, ParamSpec

import torch
from torch import Tensor

from unirl_kernels.batch import IGNORE, Batch
from unirl_kernels.integrations.one_pass import OnePass, ScoredTokens
from unirl_kernels.integrations.trl.configuration import with_options
from unirl_kernels.objectives import Loss

P = ParamSpec("P")

RATIO = "importance_sampling_ratio"
"""What GRPOTrainer calls its weights of vLLM's samples: [B, L], or [B, 1] at the level of sequences."""

SHARDED = "whose weights or sequences are not whole on a rank; use DistributedDataParallel, or patch()"


class OnePassTrainer(ABC):
    """The loss of a trainer, and what it logs, from one pass.

    The trainer's own function runs on the log-probabilities and observations that the pass returns: it logs what it
    always logs. The loss and its gradient are those of the pass.

    Args:
        trainer: of the class ``KIND``.

    Raises:
        TypeError: when it computes its loss otherwise.
        RuntimeError, ValueError: when one pass cannot make what the configuration asks for.
    """

    KIND: ClassVar[str]
    REPLACED: ClassVar[str] = "_compute_loss"
    """The trainer's method that ``compute_loss`` replaces."""

    METHODS: ClassVar[tuple[str, ...]]
    """Methods that the trainer's class must not override."""

    OPTIONS: ClassVar[Mapping[str, str]] = {}
    """Attributes that the trainer's own loss reads, with the options from which they are set."""

    GIVEN: ClassVar[Mapping[str, str]] = {}
    """Arguments of the loss: fields with what the trainer has computed."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._options: dict[str, Any] = {}
        self._check()
        self._loss, self._options = with_options(self._config(), **self.GIVEN)

    def _config(self) -> Any:
        """The configuration of the loss."""
        return self._trainer.args

    @abstractmethod
    def compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Replaces the trainer's own method."""

    def _own(self, work: OnePass, model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
        """Call the trainer's own method, while the head computes the loss of ``work``."""
        with work.awaited():
            return getattr(type(self._trainer), self.REPLACED)(self._trainer, model, inputs, **options)

    def _check(self) -> None:
        import trl
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        trainer, base = self._trainer, getattr(trl, self.KIND)
        for name in (self.REPLACED, *self.METHODS):
            self._check_method(name, base)
        args = trainer.args
        if is_deepspeed_zero3_enabled():
            raise ValueError(f"trainer must not run DeepSpeed's ZeRO-3, {SHARDED}")
        if trainer.is_fsdp_enabled:
            raise ValueError(f"trainer must not run FSDP, {SHARDED}")
        if trainer.accelerator.parallelism_config is not None:
            raise ValueError(f"trainer.args.parallelism_config must be None: it is for models {SHARDED}")
        if args.n_gpu > 1:
            raise ValueError(
                f"trainer.args.n_gpu must be at most 1 (no DataParallel), got {args.n_gpu}: launch processes"
            )
        if args.torch_compile:
            raise ValueError("trainer.args.torch_compile must be False: the loss is made inside of the model's forward")
        if trainer.aux_loss_enabled:
            raise ValueError("trainer.args.router_aux_loss_coef must be 0.0: the model computes the routers' loss")
        self._check_options()

    def _check_method(self, name: str, base: type) -> None:
        """Raise if a method is not TRL's: overridden, or replaced in the class or in the object."""
        found = [getattr(type(self._trainer), name)]
        replaced = vars(self._trainer).get(name)
        if replaced is not None and not isinstance(getattr(replaced, "__self__", None), OnePassTrainer):
            found.append(replaced)
        if any(x is not getattr(base, name) or not _is_of_trl(x) for x in found):
            kind = type(self._trainer).__name__
            raise TypeError(f"trainer must compute its loss as {self.KIND}, got {kind} with its own {name}")

    def _check_options(self) -> None:
        """The loss was made from the configuration. TRL's own reads the trainer and the configuration at each step."""
        for name, option in self.OPTIONS.items():
            self._check_option(name, option, getattr(self._trainer.args, option))
        config = self._config()
        for name, value in self._options.items():
            if (now := getattr(config, name)) != value:
                raise ValueError(
                    f"trainer.args.{name} must stay {value!r} after fuse(trainer), got {now!r}: fuse it again"
                )

    def _check_option(self, name: str, option: str, expected: Any) -> None:
        if (value := getattr(self._trainer, name)) != expected:
            raise ValueError(f"trainer.{name} must be trainer.args.{option} = {expected!r}, got {value!r}")

    def _check_clip(self) -> None:
        args = self._trainer.args
        option = "epsilon" if args.epsilon_high is None else "epsilon_high"
        self._check_option("epsilon_high", option, getattr(args, option))

    def _with_empty(self, loss: Tensor, own: Tensor, tokens: ScoredTokens) -> Tensor:
        """TRL adds a constant without a gradient for a sequence that has no tokens; the loss of the pass adds 0."""
        return loss + torch.where((tokens.lengths == 0).any(), own.detach() - loss.detach(), 0)


def _is_of_trl(function: Any) -> bool:
    """Whether a function is TRL's, or a decorator of TRL or torch around it. ``functools.wraps`` copies the name of the
    module, but not the globals."""
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] in ("trl", "torch")


def _detached(
    score: Callable[P, tuple[Tensor, Tensor, Any]], inputs: Mapping[str, Any]
) -> Callable[P, tuple[Tensor, Tensor, None]]:
    """Log-probabilities and entropies as the trainer's own function logs them."""

    def scored(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, Tensor, None]:
        logp, entropy, _ = score(*args, **kwargs)
        logp = logp.detach()
        if "tool_mask" in inputs and inputs.get("old_per_token_logps") is not None:
            # Not scored here. A ratio of 0 probability would be inf, and what is logged NaN.
            logp = torch.where(inputs["tool_mask"] == 0, inputs["old_per_token_logps"], logp)
        return logp, entropy.detach(), None

    return scored


class OnePassGRPO(OnePassTrainer):
    """Of a GRPOTrainer."""

    KIND = "GRPOTrainer"
    METHODS = (
        *("compute_loss", "_get_per_token_logps_and_entropies"),
        *("get_off_policy_mask", "get_high_entropy_mask", "get_gamma_weights"),
    )
    OPTIONS: ClassVar = {
        "loss_type": "loss_type",
        "beta": "beta",
        "epsilon_low": "epsilon",
        "importance_sampling_level": "importance_sampling_level",
        "top_entropy_quantile": "top_entropy_quantile",
        "off_policy_mask_threshold": "off_policy_mask_threshold",
        "max_completion_length": "max_completion_length",
        "use_vllm": "use_vllm",
        "vllm_importance_sampling_correction": "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode": "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_min": "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_clip_max": "vllm_importance_sampling_clip_max",
        "use_adaptive_entropy": "use_adaptive_entropy",
    }

    GIVEN: ClassVar = {"rollout_weight": RATIO}

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._losses = {1.0: self._loss}

    def compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        trainer = self._trainer
        self._check_options()
        training = trainer.model.training
        steps = trainer.args.gradient_accumulation_steps
        factor = steps / (trainer.current_gradient_accumulation_steps if training else 1)
        work = OnePass(self._times(factor), self._batch_of(inputs, training))
        trainer._get_per_token_logps_and_entropies = _detached(trainer._get_per_token_logps_and_entropies, inputs)
        try:
            self._own(work, model, inputs)
        finally:
            del trainer._get_per_token_logps_and_entropies
        return work.loss

    def _times(self, factor: float) -> Loss:
        if factor not in self._losses:
            self._losses[factor] = factor * self._loss
        return self._losses[factor]

    def _batch_of(self, inputs: Mapping[str, Any], training: bool) -> Callable[[Tensor], Batch]:
        """Makes the batch of the completions' tokens, packed, of their targets."""
        trainer, tokens = self._trainer, ScoredTokens(inputs["completion_mask"])

        def given(name: str) -> Tensor | None:
            return None if inputs.get(name) is None else tokens.packed(inputs[name])

        def batch(targets: Tensor) -> Batch:
            if (tools := given("tool_mask")) is not None:
                targets = targets.masked_fill(tools == 0, IGNORE)
            values = {"advantage": inputs["advantages"]}
            if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
                values[RATIO] = inputs[RATIO]
            of_sequences = [name for name, x in values.items() if x.dim() == 1 or x.shape[1] == 1]
            fields = {name: x.reshape(-1) if name in of_sequences else tokens.packed(x) for name, x in values.items()}
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
                fields.pop("advantage"),
                given("old_per_token_logps"),
                given("ref_per_token_logps") if trainer.beta else None,
                tokens.ends,
                fields=fields,
                sequence_fields=of_sequences,
            )

        return batch

    def _check(self) -> None:
        super()._check()
        args = self._trainer.args
        threshold = args.off_policy_mask_threshold
        if threshold is not None and not args.use_vllm and self._trainer.rollout_func is not None:
            raise ValueError(
                f"trainer.args.off_policy_mask_threshold={threshold} goes by the log-probabilities of rollout_func, "
                "which one pass would not read: set it to None, or use_vllm=True"
            )

    def _check_options(self) -> None:
        super()._check_options()
        self._check_clip()
        trainer = self._trainer
        if not trainer.use_adaptive_entropy and trainer.entropy_coef != trainer.args.entropy_coef:
            raise ValueError(
                f"trainer.entropy_coef must be trainer.args.entropy_coef = {trainer.args.entropy_coef!r}, "
                f"got {trainer.entropy_coef!r}"
            )


class OnePassRLOO(OnePassTrainer):
    """Of an RLOOTrainer, which knows the log-probabilities of the old policy by their sum over a sequence."""

    KIND = "RLOOTrainer"
    METHODS = ("compute_loss", "_get_per_token_logps_and_entropies")
    OPTIONS: ClassVar = {"epsilon_low": "epsilon"}

    def _check_options(self) -> None:
        super()._check_options()
        self._check_clip()

    def compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        self._check_options()
        tokens = ScoredTokens(inputs["completion_mask"])

        def batch(targets: Tensor) -> Batch:
            old = tokens.at_first(inputs["old_logps"])
            return Batch(targets, inputs["advantages"], old, None, tokens.ends, sequence_fields=["advantage"])

        work = OnePass(self._loss, batch)
        own = self._own(work, model, inputs)
        return self._with_empty(work.loss, own, tokens)
