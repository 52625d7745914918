"""Causal language models of Hugging Face transformers: their loss, and their output layer without logits."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from types import MethodType, TracebackType
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from unirl_kernels.api import fused_linear_loss, fused_loss
from unirl_kernels.batch import IGNORE, Batch, shift_targets
from unirl_kernels.integrations.heads import head_parameters
from unirl_kernels.objectives import SFT, Loss, TokenMean
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout

P = ParamSpec("P")


LOSS_PARAMETERS = (*("logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels", "kwargs"),)
"""The parameters of transformers' own ``ForCausalLMLoss``."""


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
        labels: [B, L] int64, the tokens themselves: position t is scored against label t + 1.
        vocab_size: V.
        num_items_in_batch: the number of labels of the whole optimisation step, > 0; a number, or a tensor with one
            number. Under gradient accumulation this batch has only a part of them. None: the labels of this batch.
        ignore_index: label of ignored tokens.
        shift_labels: [B, L] int64, labels that are already shifted; they replace ``labels``.
        kwargs: what transformers passes to every loss; not used.

    Returns:
        0-dim; 0 if all labels are ignored.

    Raises:
        ValueError: when there are no labels, V is not ``vocab_size``, or ``num_items_in_batch`` holds several numbers.
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
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items_in_batch must be one number, got shape {tuple(num_items.shape)}")
        num_items = num_items.reshape(()).to(device)  # Trainer gives the replicas of DataParallel [1, 1]
    return Loss(SFT(), TokenMean(num_items))


def readout_of(config: Any) -> Readout:
    """How a model's logits become a distribution, from its configuration: soft cap and scale.

    Args:
        config: transformers' configuration of the model. Known are ``final_logit_softcapping`` (Gemma 2),
            ``logits_soft_cap`` (RecurrentGemma), ``output_logit_soft_cap`` (xLSTM), ``logit_scale`` (Cohere),
            ``output_multiplier``, ``lm_head_multiplier`` (Falcon H1), ``logits_mup_width_multiplier`` (Inkling divides
            by it) and ``logits_scaling`` (Granite divides by it, HyperCLOVA X multiplies).

    Returns:
        ``Readout``; the identity where none of them is set.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def known(*names: str) -> list[float]:
        return [float(value) for name in names if (value := getattr(text, name, None)) is not None]

    scale = math.prod(known("logit_scale", "output_multiplier", "lm_head_multiplier"))
    scale /= math.prod(known("logits_mup_width_multiplier"))
    scaling = math.prod(known("logits_scaling"))
    scale = scale * scaling if getattr(text, "model_type", None) == "hyperclovax" else scale / scaling
    caps = known("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return Readout(softcap=caps[0] if caps else None, scale=scale)


class FusedHead:
    """Lets a causal language model compute its loss without logits, until ``undo`` or the end of a ``with`` block.

    With labels, the forward runs the backbone, computes the loss from the hidden states, and returns ``logits=None``.
    Without labels, for instance in generation, it is the model's own forward. The loss is ``causal_lm_loss``, including
    ``num_items_in_batch`` of gradient accumulation. A deep copy of the model and a replica of DataParallel also have
    this head, until ``undo``. A saved or pickled model does not.

    Training with ``Trainer`` needs no other change. If Trainer computes the loss itself (``label_smoothing_factor``,
    ``compute_loss_func``), it keeps the labels, so that the model's own forward runs and computes logits. An evaluation
    returns only the loss: the predictions of ``predict`` and for ``compute_metrics`` are ``()``.

    Args:
        model: a causal language model of transformers, or a PEFT model around one. It is run on three tokens, to check
            that its logits follow from its output layer and its configuration, and that its loss is ``causal_lm_loss``.
        plan: how the machine computes the loss.

    Raises:
        TypeError, ValueError: when the model computes its logits or its loss in an unknown way. The forward raises
            ValueError if model or configuration were changed since, so that its own loss would be another one.
    """

    def __init__(self, model: Any, plan: Plan = Plan()) -> None:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            raise ValueError("model must not add a router's loss to its own: set config.output_router_logits to False")
        if model.config.is_encoder_decoder or model.base_model is model:
            raise TypeError(f"model must be a backbone and an output layer, got {type(model).__name__}")
        self._model, self._plan, self._readout = model, plan, readout_of(model.config)
        self._kept = _beside_the_loss()
        self._loss_function = getattr(model, "loss_function", None)
        self._check()
        self._active, self._before = True, vars(model).get("forward")
        self._ours = model.forward = MethodType(self._forward_of(model.forward), model)
        model._replicate_for_data_parallel = MethodType(self._replicate_of(self._ours.__func__), model)

    def undo(self) -> None:
        """Restore the model's own forward. A second call does nothing."""
        self._active = False  # if something else has wrapped this forward meanwhile, it stays, but does nothing
        vars(self._model).pop("_replicate_for_data_parallel", None)
        if vars(self._model).get("forward") is self._ours:
            del self._model.forward
            if self._before is not None:
                self._model.forward = self._before

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def _check(self) -> None:
        """Raise unless output layer and configuration turn hidden states into the model's logits, those to its loss.

        The hidden states are random, and so large that a soft cap shows; the backbone's own may be small, or zero.
        """
        model, name, scale, cap = self._model, type(self._model).__name__, self._readout.scale, self._readout.softcap
        ours = None

        def in_place_of_backbone(_: nn.Module, __: Any, output: Any) -> Any:
            nonlocal ours
            weight, bias = head_parameters(model.get_output_embeddings())
            shape = output.last_hidden_state.shape
            if weight.shape[1] != shape[-1]:
                raise ValueError(f"model's output layer must take hidden states of {shape[-1]}, got {weight.shape[1]}")
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(output.last_hidden_state)
            x = x * (_LARGE / (linear(x, weight, bias) * scale).abs().max().clamp_min(1e-6))
            ours = linear(x, weight, bias).float() * scale
            ours = ours if cap is None else cap * torch.tanh(ours / cap)
            output.last_hidden_state = x
            return output

        was_training, hook = model.training, model.base_model.register_forward_hook(in_place_of_backbone)
        ids = torch.zeros(1, 3, dtype=torch.int64, device=model.device)
        # A masked position with a label shows whether the loss reads anything besides labels.
        mask = torch.tensor([[1, 1, 0]], device=model.device)
        try:
            model.eval()
            with torch.no_grad():
                theirs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, return_dict=True)
        finally:
            model.train(was_training)
            hook.remove()
        if theirs.logits is None:
            raise ValueError(f"model must return logits beside its loss; has {name} a fused head already?")
        if ours is None:
            raise TypeError(f"model must run its base_model and an output layer; {name} calls something else")
        # With another order of operations the model's own dtype rounds differently.
        rounding = torch.finfo(theirs.logits.dtype).eps
        if not (_close(theirs.logits, ours, rounding) and _close_in_norm(theirs.logits, ours, rounding)):
            raise ValueError(
                f"model's logits must be those of its output layer with {self._readout}; {name} makes others"
            )
        if not _close(theirs.loss, causal_lm_loss(theirs.logits, ids), rounding=torch.finfo(theirs.loss.dtype).eps):
            raise ValueError(f"model's loss must be the mean of -log pi over the labels; {name} makes another")

    def _forward_of(self, own: Callable[P, Any]) -> Callable[..., Any]:
        """The model's forward as a function that also takes the model, so that a copy of the model runs the copy."""
        function = getattr(own, "__func__", lambda _, *args, **kwargs: own(*args, **kwargs))
        signature = inspect.signature(own)
        rest = [name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]

        @functools.wraps(own)
        def forward(model: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
            named = dict(signature.bind(*args, **kwargs).arguments) if self._active else {}
            for name in rest:
                named |= named.pop(name, {})
            if named.get("labels") is None and named.get("shift_labels") is None:
                return function(model, *args, **kwargs)
            return self._with_loss(model, **named)

        # inspect leaves out the first parameter of a method.
        model = inspect.Parameter("model", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[model, *signature.parameters.values()]
        )
        return forward

    @staticmethod
    def _replicate_of(forward: Callable[..., Any]) -> Callable[[Any], Any]:
        """How DataParallel copies the model: torch would leave the replica with a forward that is the model's."""

        def _replicate_for_data_parallel(model: Any) -> Any:
            replica = type(model)._replicate_for_data_parallel(model)
            if getattr(model.forward, "__func__", None) is forward:
                replica.forward = MethodType(forward, replica)
            return replica

        return _replicate_for_data_parallel

    def _check_unchanged(self, model: Any) -> None:
        """Raise if the model would compute another loss by now than the one that was checked."""
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            raise ValueError("config.output_router_logits must stay False under a fused head, got True")
        if getattr(model, "loss_function", None) != self._loss_function:
            raise ValueError("model.loss_function must not change under a fused head: undo it first")
        now, then = readout_of(model.config), self._readout
        if (now.scale, now.softcap) != (then.scale, then.softcap):
            raise ValueError(f"model.config must stay with {then} under a fused head, got {now}")

    def _with_loss(
        self,
        model: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = IGNORE,
        **inputs: Any,
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if inputs.get("return_dict") is None:
            inputs["return_dict"] = model.config.return_dict
        for name, harmless in (("logits_to_keep", 0), ("return_dict", True), ("output_router_logits", False)):
            given = inputs.pop(name, None)
            if given is not None and (isinstance(given, Tensor) or given != harmless):
                raise ValueError(f"{name} must be {harmless} where labels are given to a fused head, got {given}")
        self._check_unchanged(model)
        outputs = model.base_model(**inputs, return_dict=True)
        hidden = outputs.last_hidden_state
        batch = _batch(labels, shift_labels, ignore_index, hidden.device)
        weight, bias = head_parameters(model.get_output_embeddings())
        how: dict[str, Any] = {"bias": bias, "readout": self._readout, "plan": self._plan}
        loss = fused_linear_loss(hidden, weight, batch, _mean(num_items_in_batch, hidden.device), **how).loss
        return CausalLMOutputWithPast(loss=loss, **{name: outputs.get(name) for name in self._kept})


def _beside_the_loss() -> tuple[str, ...]:
    """Outputs of a model besides loss and logits: its cache (``past_key_values`` or ``cache``, by release), and
    others."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return tuple(x.name for x in fields(CausalLMOutputWithPast) if x.name not in ("loss", "logits"))


_LARGE = 64.0  # logits so large that usual soft caps (15 to 50) change them much more than rounding does


def _close(theirs: Tensor, ours: Tensor, rounding: float) -> bool:
    """Whether they are equal up to a few roundings of the largest."""
    if theirs.shape != ours.shape:
        return False
    return bool((theirs.float() - ours.float()).abs().max() <= 16 * rounding * theirs.float().abs().max())


def _close_in_norm(theirs: Tensor, ours: Tensor, rounding: float) -> bool:
    """Whether the norm of their difference is at most a rounding of their norm.

    A rounding is at most half a unit, 0.29 units in the mean square, so that four of them are below 0.6. In bf16 this
    finds a factor, or a bias, that could be a rounding of each logit alone.
    """
    theirs, ours = theirs.double(), ours.double()
    return bool((theirs - ours).norm() <= max(rounding, 1e-5) * ours.norm())
