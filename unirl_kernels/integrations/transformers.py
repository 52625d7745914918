"""Causal language models of Hugging Face transformers: their loss, and their output layer without logits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from unirl_kernels.api import fused_linear_loss, fused_loss
from unirl_kernels.batch import IGNORE, Batch, shift_targets
from unirl_kernels.integrations.heads import head_parameters
from unirl_kernels.objectives import SFT, Loss, TokenMean
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """A model's ``loss_function``: the mean of -log pi over the labels, in one pass over the logits.

        model.loss_function = causal_lm_loss

    Args:
        logits: [B, L, V], any floating dtype; not converted, and internals are float32.
        labels: [B, L] int64, the tokens themselves: place t is scored against label t + 1.
        vocab_size: V.
        num_items_in_batch: labels of the whole optimisation step, > 0, which is more than this batch holds under
            gradient accumulation; None counts those of the batch.
        ignore_index: label of a token that does not count.
        shift_labels: [B, L] int64, labels in place of ``labels`` that are shifted already.
        kwargs: what transformers passes to every loss; not used.

    Returns:
        0-dim; 0 where no label counts.

    Raises:
        ValueError: when there are no labels, or V is not ``vocab_size``.
    """
    if vocab_size is not None and logits.shape[-1] != vocab_size:
        raise ValueError(f"logits must have {vocab_size} columns (vocab_size), got {logits.shape[-1]}")
    batch = _batch(labels, shift_labels, ignore_index, logits.device)
    return fused_loss(logits, batch, _mean(num_items_in_batch, logits.device)).loss


def _batch(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int, device: torch.device) -> Batch:
    given = shift_labels if shift_labels is not None else labels
    if given is None:
        raise ValueError("labels or shift_labels must be given")
    given = given.to(device)
    if ignore_index != IGNORE:
        given = torch.where(given == ignore_index, IGNORE, given)
    return Batch(given if shift_labels is not None else shift_targets(given))


def _mean(num_items: int | Tensor | None, device: torch.device) -> Loss:
    return Loss(SFT(), TokenMean(num_items.to(device) if isinstance(num_items, Tensor) else num_items))


def readout_of(config: Any) -> Readout:
    """How a model's logits become a distribution, from its configuration: soft cap and scale.

    Args:
        config: transformers' configuration of the model. Known are ``final_logit_softcapping`` (Gemma 2),
            ``logit_scale`` (Cohere), ``output_multiplier``, ``lm_head_multiplier`` (Falcon H1) and ``logits_scaling``
            (Granite divides by it, HyperCLOVA X multiplies).
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    factors = (getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    scale = next((float(factor) for factor in factors if factor is not None), 1.0)
    if (scaling := getattr(text, "logits_scaling", None)) is not None:
        scale *= scaling if text.model_type == "hyperclovax" else 1 / scaling
    return Readout(softcap=getattr(text, "final_logit_softcapping", None), scale=scale)


class FusedHead:
    """Lets a causal language model return its loss without making logits, until ``undo`` or the end of a ``with``.

    With labels its forward runs the backbone, takes the loss from the hidden states and returns ``logits=None``;
    without labels (in generation, say) it is the model's own. The loss is ``causal_lm_loss``, gradient accumulation's
    ``num_items_in_batch`` included. Trained with ``Trainer``, nothing else changes; in evaluation ask for the loss
    only (``prediction_loss_only=True``), for there are no logits to return.

    Args:
        model: transformers' model for causal language modelling. It is run on one token, to see that its logits are
            what its output layer and its configuration say.
        plan: how the machine computes the loss.

    Raises:
        TypeError, ValueError: when the model's logits are made in a way that is not known.
    """

    def __init__(self, model: Any, plan: Plan = Plan()) -> None:
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            raise ValueError("model must not add a router's loss to its own: set config.output_router_logits to False")
        self._model, self._plan, self._readout = model, plan, readout_of(model.config)
        self._check()
        self._own = model.forward
        model.forward = self._forward_of(self._own)

    def undo(self) -> None:
        """Give the model its own forward back. A second time does nothing."""
        vars(self._model).pop("forward", None)

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def _check(self) -> None:
        """Raise unless hidden states, output layer and configuration give the model's logits."""
        model, cap = self._model, self._readout.softcap
        was_training = model.training
        model.eval()
        with torch.no_grad():
            one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            theirs = model(input_ids=one, use_cache=False).logits.float()
            hidden = model.base_model(input_ids=one, use_cache=False).last_hidden_state
            ours = linear(hidden, *head_parameters(model.get_output_embeddings())).float() * self._readout.scale
            ours = ours if cap is None else cap * torch.tanh(ours / cap)
        model.train(was_training)
        off = float((theirs - ours).abs().max()) if theirs.shape == ours.shape else float("inf")
        # In another order of operations the model's own dtype rounds otherwise.
        if not off <= 32 * torch.finfo(hidden.dtype).eps * float(theirs.abs().max()):
            raise ValueError(
                f"model's logits must be those of its output layer with {self._readout}; "
                f"{type(model).__name__} makes others, off by {off:.3g}"
            )

    def _forward_of(self, own: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(own)

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            named = {name: x for name, x in given.items() if name != "kwargs"} | given.get("kwargs", {})
            if named.get("labels") is None and named.get("shift_labels") is None:
                return own(*args, **kwargs)
            return self._with_loss(**named)

        return forward

    def _with_loss(
        self,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = IGNORE,
        **inputs: Any,
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        for name, harmless in (("logits_to_keep", 0), ("return_dict", True), ("output_router_logits", False)):
            if inputs.pop(name, None) not in (None, harmless):
                raise ValueError(f"{name} must be {harmless} where labels are given to a fused head")
        outputs = self._model.base_model(**inputs)
        hidden = outputs.last_hidden_state
        batch = _batch(labels, shift_labels, ignore_index, hidden.device)
        weight, bias = head_parameters(self._model.get_output_embeddings())
        how: dict[str, Any] = {"bias": bias, "readout": self._readout, "plan": self._plan}
        loss = fused_linear_loss(hidden, weight, batch, _mean(num_items_in_batch, hidden.device), **how).loss
        return CausalLMOutputWithPast(
            loss=loss,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
