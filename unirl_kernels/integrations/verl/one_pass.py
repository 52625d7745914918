"""``integrations.verl.fuse``: the loss of verl's actor in one pass of its model's head."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from unirl_kernels.batch import IGNORE, Batch
from unirl_kernels.integrations.one_pass import OnePass, reached_by
from unirl_kernels.integrations.options import Options
from unirl_kernels.integrations.verl.configuration import WEIGHTS
from unirl_kernels.integrations.verl.configuration import loss as loss_of
from unirl_kernels.objectives import Loss

COUNTS = ("dp_size", "batch_num_tokens", "global_batch_size")
"""What verl's ``ppo_loss`` reads of a micro-batch to normalise its loss."""

FUSED_FORWARDS = ("forward_with_torch_backend", "forward_with_triton_backend")
"""verl's forwards that call the head that is replaced, in ``verl.models.transformers``."""

WEIGHTED = {"bypass_mode": False, "rollout_is": "token"}
"""A correction whose weights the micro-batch brings."""


class OnePassActor:
    """The loss of an actor, and what it logs, from one pass.

    verl's own ``ppo_loss`` runs on the log-probabilities and entropies that the pass returns: it logs what it always
    logs. The loss and its gradient are those of the pass.

    Args:
        worker: a TrainingWorker, or what has its ``engine`` and ``loss_fn``.

    Raises:
        TypeError: when the engine or the loss function is another.
        RuntimeError, ValueError: when one pass cannot make what the configuration asks for.
    """

    def __init__(self, worker: Any) -> None:
        self._engine, self._loss_fn = worker.engine, worker.loss_fn
        self._config = _checked_config(self._engine, self._loss_fn)
        self._padding = importlib.import_module("verl.workers.utils.padding")
        self._data = importlib.import_module("verl.utils.tensordict_utils")
        self._made: tuple[tuple[Any, ...], Loss] = ((), loss_of(self._config))

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """What takes the place of the engine's ``forward_step``."""
        own = functools.partial(type(self._engine).forward_step, self._engine)
        if forward_only or loss_function is not self._loss_fn:
            return own(micro_batch, loss_function=loss_function, forward_only=forward_only)
        self._check_data(micro_batch)
        work, output_log_probs = OnePass(self._loss(micro_batch), self._batch_of(micro_batch)), []

        def seen(model_output: Any, **others: Any) -> Any:
            output_log_probs.append(model_output["log_probs"].values())
            return loss_function(model_output=model_output, **others)

        with work.awaited():
            _, output = own(micro_batch, loss_function=seen, forward_only=False)
        output["loss"] = work.loss.detach().item()
        # FSDP gathers weights for the backward when it reaches what the model returned.
        return reached_by(work.loss, output_log_probs[0]), output

    def _check_data(self, data: Any) -> None:
        expected = {"use_fused_kernels": True, "use_remove_padding": True, "distillation_use_topk": False}
        expected |= {"calculate_sum_pi_squared": False}
        defaults = {"use_remove_padding": True}
        for name, value in expected.items():
            found = self._data.get_non_tensor_data(data=data, key=name, default=defaults.get(name, False))
            if bool(found) != value:
                raise ValueError(f"{name} must be {value} for a loss in one pass of the head, got {found!r}")
        entropy = self._data.get_non_tensor_data(data=data, key="calculate_entropy", default=False)
        if self._config.entropy_coeff and not entropy:
            raise ValueError(
                f"calculate_entropy must be True with entropy_coeff={self._config.entropy_coeff}, got {entropy!r}: "
                "verl would leave the entropy out of the loss"
            )

    def _loss(self, data: Any) -> Loss:
        """The loss, whose counts are the micro-batch's."""
        counts = {name: data[name] for name in COUNTS}
        weighted = WEIGHTS in data
        made_for = (*counts.values(), weighted)
        if self._made[0] != made_for:
            self._config.global_batch_info.update(counts)
            self._made = made_for, loss_of(self._config, WEIGHTED if weighted else None)
        return self._made[1]

    def _batch_of(self, data: Any) -> Callable[[Tensor], Batch]:
        """Makes the batch of all tokens, packed, of their targets: the next token where it is a response's."""
        names = ["advantages", "old_log_probs", *(["ref_log_prob"] if self._config.use_kl_loss else [])]
        names += [WEIGHTS] if WEIGHTS in data else []
        padded = data.select("response_mask", *names).to_padded_tensor()
        ends = data["input_ids"].offsets()
        n = data["input_ids"].values().shape[0]
        counted = padded["response_mask"].bool()
        # verl's own cut of the responses, of the tokens' numbers.
        at = self._padding.no_padding_2_padding(torch.arange(n, device=ends.device), data)[counted]

        def batch(targets: Tensor) -> Batch:
            places = at.to(targets.device)

            def packed(name: str) -> Tensor:
                given = padded[name][counted].to(targets.device)
                return torch.zeros_like(targets, dtype=given.dtype).index_put((places,), given)

            found = {name: packed(name) for name in names}
            return Batch(
                torch.full_like(targets, IGNORE).index_put((places,), targets[places]),
                found["advantages"],
                found["old_log_probs"],
                found.get("ref_log_prob"),
                # What the engine pads the packed tokens by is counted to the last sequence, and ignored.
                pad(ends[:-1], (0, 1), value=targets.shape[0]).to(targets.device),
                {name: x for name, x in found.items() if name == WEIGHTS},
            )

        return batch


def _checked_config(engine: Any, loss_fn: Any) -> Any:
    """The actor's configuration."""
    losses = importlib.import_module("verl.workers.utils.losses")
    engines = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    own = engines.FSDPEngineWithLMHead
    if not isinstance(engine, own) or type(engine).forward_step is not own.forward_step:
        raise TypeError(
            f"worker.engine must be verl's FSDPEngineWithLMHead, got {type(engine).__name__}: use patch() instead"
        )
    if getattr(loss_fn, "func", None) is not losses.ppo_loss:
        name = getattr(loss_fn, "func", loss_fn)
        raise TypeError(
            f"worker.loss_fn must be partial(ppo_loss, config=...) of verl, got {getattr(name, '__name__', name)!r}: "
            "use patch() for distillation, critics and your own losses"
        )
    if engine.use_ulysses_sp:
        raise ValueError(
            f"ulysses_sequence_parallel_size must be 1, got {engine.ulysses_sequence_parallel_size}: a rank sees a "
            "part of each sequence"
        )
    for name in ("use_fused_kernels", "use_remove_padding"):
        if not getattr(engine.engine_config, name):
            raise ValueError(
                f"actor_rollout_ref.model.{name} must be True for a loss in one pass of the head, got False: set it, "
                "or use patch()"
            )
    if not any(type(module).forward.__name__ in FUSED_FORWARDS for module in engine.module.modules()):
        raise ValueError(
            "fused_kernel_options.impl_backend must be 'torch', 'triton' or 'liger', for a model that verl has a fused "
            f"forward of; {type(engine.module).__name__} has its own forward: set it, or use patch()"
        )
    config = loss_fn.keywords["config"]
    _check_options(Options(config, "ActorConfig"))
    return config


def _check_options(options: Options) -> None:
    """Refuse what one pass cannot make, beside what no loss can."""
    if options.part("policy_loss").get("loss_mode") == "clip_cov":
        raise options.part("policy_loss").refused("loss_mode", "verl chooses tokens at random; use patch()")
    if options.get("loss_agg_mode") == "seq-mean-token-sum-norm" and options.get("loss_scale_factor") is None:
        raise options.refused("loss_agg_mode", "the length of padded responses is not known: set loss_scale_factor")
    if options.flag("calculate_sum_pi_squared"):
        raise ValueError(
            f"{options.title}.calculate_sum_pi_squared must be False with use_fused_kernels, got True: verl needs "
            "the logits for it; choose an advantage estimator other than the optimal token baseline"
        )
