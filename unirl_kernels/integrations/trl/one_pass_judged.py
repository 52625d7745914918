"""``integrations.trl.fuse`` of DPOTrainer, KTOTrainer and SFTTrainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from unirl_kernels.batch import Batch
from unirl_kernels.integrations.one_pass import OnePass, ScoredTokens
from unirl_kernels.integrations.trl.one_pass import OnePassTrainer


def _batch_of(
    tokens: ScoredTokens, of_sequences: Mapping[str, Tensor], of_all: Mapping[str, Tensor] | None = None
) -> Callable[[Tensor], Batch]:
    """Makes the batch of the scored tokens, packed, of their targets.

    Args:
        tokens: the scored tokens.
        of_sequences: fields, [S].
        of_all: fields, [].
    """
    fields = {**of_sequences, **(of_all or {})}

    def batch(targets: Tensor) -> Batch:
        return Batch(targets, cu_seqlens=tokens.ends, fields=fields, sequence_fields=list(of_sequences))

    return batch


class OnePassJudged(OnePassTrainer):
    """Of a trainer with a reference policy, which is scored first: the pass needs its log-probabilities."""

    METHODS: ClassVar[tuple[str, ...]] = ("compute_loss", "compute_ref_log_probs")

    def _config(self) -> Any:
        config = copy.copy(self._trainer.args)
        config.precompute_ref_log_probs = True
        return config

    @contextmanager
    def _references_given(self) -> Iterator[None]:
        """The trainer takes the reference's log-probabilities from its inputs."""
        trainer, before = self._trainer, self._trainer.precompute_ref_logps
        trainer.precompute_ref_logps = True
        try:
            yield
        finally:
            trainer.precompute_ref_logps = before

    def _reference(self, inputs: Mapping[str, Any]) -> Any:
        """What ``compute_ref_log_probs`` returns."""
        trainer = self._trainer
        return trainer.compute_ref_log_probs(trainer.model if trainer.ref_model is None else trainer.ref_model, inputs)

    def _check(self) -> None:
        super()._check()
        adapter = getattr(self._trainer.model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise ValueError(f"trainer's PEFT method must not add virtual tokens, got {adapter.peft_type.value}")

    def _check_options(self) -> None:
        super()._check_options()
        trainer = self._trainer
        if trainer.precompute_ref_logps != trainer.args.precompute_ref_log_probs:
            raise ValueError(
                "trainer.precompute_ref_logps must be trainer.args.precompute_ref_log_probs = "
                f"{trainer.args.precompute_ref_log_probs!r}, got {trainer.precompute_ref_logps!r}"
            )


class OnePassDPO(OnePassJudged):
    """Of a DPOTrainer."""

    KIND = "DPOTrainer"
    OPTIONS: ClassVar = {
        "beta": "beta",
        "loss_types": "loss_type",
        "ld_alpha": "ld_alpha",
        "f_divergence_type": "f_divergence_type",
        "f_alpha_divergence_coef": "f_alpha_divergence_coef",
        "label_smoothing": "label_smoothing",
        "use_weighting": "use_weighting",
    }

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False) -> Any:
        self._check_options()
        if not self._trainer.precompute_ref_logps:
            chosen, rejected = self._reference(inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        references = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        tokens = ScoredTokens(inputs["completion_mask"][:, 1:])
        work = OnePass(self._loss, _batch_of(tokens, {"ref_logps": references}))
        with self._references_given():
            own = self._own(work, model, inputs, return_outputs=return_outputs)
        return (work.loss, own[1]) if return_outputs else work.loss

    def _check(self) -> None:
        super()._check()
        args = self._trainer.args
        averaged = {"ipo", "sigmoid_norm"} & set(args.loss_type)
        if averaged and args.truncation_mode == "keep_end" and args.max_length is not None:
            raise ValueError(
                f"trainer.args.truncation_mode must be 'keep_start' with loss_type {min(averaged)!r}, got 'keep_end': "
                "where it cuts a whole prompt off, TRL counts a token that is not scored"
            )
        if self._trainer.args.use_weighting:
            raise ValueError(
                "trainer.args.use_weighting must be False: its weights need the whole distributions before the loss, a "
                "pass more; use patch()"
            )

    def _check_options(self) -> None:
        super()._check_options()
        trainer = self._trainer
        expected = trainer.args.loss_weights or [1.0] * len(trainer.loss_types)
        if trainer.loss_weights != expected:
            raise ValueError(
                f"trainer.loss_weights must be trainer.args.loss_weights = {expected!r}, got {trainer.loss_weights!r}"
            )


class OnePassKTO(OnePassJudged):
    """Of a KTOTrainer, whose estimate of the KL divergence is scored before the pass, too."""

    KIND = "KTOTrainer"
    METHODS = (*OnePassJudged.METHODS, "_compute_kl_logps")
    OPTIONS: ClassVar = {
        "beta": "beta",
        "loss_type": "loss_type",
        "desirable_weight": "desirable_weight",
        "undesirable_weight": "undesirable_weight",
    }

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False) -> Any:
        self._check_options()
        trainer = self._trainer
        kl_logps = trainer._compute_kl_logps(model, inputs)
        if not trainer.precompute_ref_logps:
            ref_logps, ref_kl_logps = self._reference(inputs)
            inputs = {**inputs, "ref_logps": ref_logps, "ref_KL_logps": ref_kl_logps}
        tokens = ScoredTokens(inputs["completion_mask"][:, 1:])
        label = torch.as_tensor(inputs["label"], device=tokens.lengths.device)
        of_all = {}
        if trainer.calculate_KL:
            kl = (kl_logps - inputs["ref_KL_logps"]).mean()
            of_all["kl"] = trainer.accelerator.gather_for_metrics(kl).mean()
        work = OnePass(self._loss, _batch_of(tokens, {"ref_logps": inputs["ref_logps"], "label": label}, of_all))
        trainer._compute_kl_logps = lambda *_: kl_logps
        try:
            with self._references_given():
                own = self._own(work, model, inputs, return_outputs=return_outputs)
        finally:
            del trainer._compute_kl_logps
        loss = self._with_empty(work.loss, own[0] if return_outputs else own, tokens)
        return (loss, own[1]) if return_outputs else loss

    def _check(self) -> None:
        super()._check()
        if self._trainer._is_vision_dataset:
            raise ValueError("trainer must learn from text: KTOTrainer scores its reference without images beforehand")


class OnePassSFT(OnePassTrainer):
    """Of an SFTTrainer."""

    KIND = "SFTTrainer"
    REPLACED = "compute_loss"
    METHODS = ()

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        self._check_options()
        args = self._trainer.args

        def batch(targets: Tensor) -> Batch:
            n = targets.numel()
            # Without a count of the step it is the batch's own, and TRL does not multiply it by the processes.
            processes = args.world_size if args.average_tokens_across_devices else 1
            count = torch.as_tensor(
                n * processes if num_items_in_batch is None else num_items_in_batch, device=targets.device
            )
            ends = torch.tensor([0, n], device=targets.device)
            return Batch(targets, cu_seqlens=ends, fields={"num_items_in_batch": count})

        work = OnePass(self._loss, batch)
        own = self._own(work, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        return (work.loss, own[1]) if return_outputs else work.loss

    def _check(self) -> None:
        super()._check()
        if self._trainer.compute_loss_func is not None:
            raise ValueError("trainer's compute_loss_func must be None: it computes a loss of its own from the logits")
