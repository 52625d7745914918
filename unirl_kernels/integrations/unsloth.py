"""unsloth's log-probabilities, entropies and SFT's loss on this package's kernels.

Tried with unsloth 2026.10. When it is imported it generates its trainers from source text, TRL's and its own. That text
imports the functions of a vocabulary from ``unsloth_zoo`` by name, so ``patch()`` covers trainers that are generated
before it or after it, and does not change their text.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from unirl_kernels.api import fused_linear_loss, linear_token_observations, linear_token_stats, logprobs
from unirl_kernels.batch import IGNORE, Batch, shift_targets
from unirl_kernels.integrations.patching import Patch, Replacement, Switch, known
from unirl_kernels.integrations.trl import FusedHead
from unirl_kernels.integrations.versions import check_release
from unirl_kernels.objectives import SFT, Loss, TokenMean
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout

TRIED = "2026.10"

SWITCH = "UNSLOTH_FUSED_LINEAR"
"""unsloth's environment variable; 0 lets it compute by functions that are not replaced."""

READOUT = ("logit_scale_multiply", "logit_scale_divide", "logit_softcapping")
WANTED = ("return_entropy", "return_mean_logits", "return_log_sum_sq_probs", "return_is_top1")
SUPPORT = tuple(f"support_{name}" for name in ("top_k", "top_p", "min_p", "triton_sampler", "excluded_ids"))
ROWS = ("rows_per_chunk", "entropy_requires_grad", "max_rows_per_chunk")

TAKEN = {
    "fused_losses.fused_linear.fused_linear_logprobs": (
        *("hidden", "weight", "targets", "bias", "mask", "temperature", *READOUT, *WANTED, *ROWS),
    ),
    "fused_losses.fused_linear.fused_linear_cross_entropy": (
        *("hidden", "weight", "bias", "targets", "divisor", "scaling", "ignore_index", *READOUT),
        *("label_smoothing", "logits_bias", "fp32_head_grad", "rows_per_chunk"),
    ),
    "rl_replacements.chunked_selective_log_softmax": ("logits", "index", "temperature", "chunks", *SUPPORT),
    "cpu.ops.cpu_chunked_log_probs": (
        *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
        *("final_logit_softcapping", "logit_scale", "outputs"),
    ),
    "cpu.ops.chunked_linear_cross_entropy": (
        *("hidden", "weight", "labels", "num_items_in_batch", "ignore_index", "shift_labels", "chunk_rows"),
    ),
}
"""Functions of ``unsloth_zoo`` that are replaced, and what each takes."""

WHERE = ("unsloth", "unsloth_zoo", "Unsloth*Trainer")
"""Modules that hold them; the last name matches those that unsloth generates."""

_switch = Switch()


def patch(plan: Plan = Plan()) -> Patch:
    """Let unsloth compute log-probabilities, entropies, SFT's loss and their gradients here, until ``unpatch()``.

    Call it after ``import unsloth``, before or after a trainer is created. Patching again only changes the plan. In a
    ``with`` statement the patch ends with the block. It covers training on GPUs and unsloth's training on a CPU.

    Args:
        plan: how the machine computes them; ``max_chunk_bytes`` replaces unsloth's chunk sizes.

    Returns:
        ``Patch``.

    Raises:
        ImportError: when unsloth is not installed, or what it needs is not.
        RuntimeError: when it does not have what was looked for. A release that was not tried warns.
        ValueError: when ``UNSLOTH_FUSED_LINEAR`` is 0.
    """
    check_release("unsloth_zoo", TRIED, TRIED)
    if os.environ.get(SWITCH, "1") == "0":
        raise ValueError(f"{SWITCH} must not be 0, which turns off the functions that are replaced: unset it")
    _switch.off()
    importlib.import_module("unsloth")  # before its parts
    replacements = []
    for path, taken in TAKEN.items():
        module, _, name = path.rpartition(".")
        theirs, _ = known(importlib.import_module(f"unsloth_zoo.{module}"), name, taken)
        replacements.append(Replacement(theirs, _instead(theirs, getattr(Functions(theirs, plan), name)), WHERE))
    return _switch.on(replacements)


def unpatch() -> None:
    """Restore unsloth's own functions. Without a patch it does nothing."""
    _switch.off()


Given = ParamSpec("Given")
Result = TypeVar("Result")


def _instead(theirs: Callable[..., Any], ours: Callable[Given, Result]) -> Callable[Given, Result]:
    """``ours``, with the source text of ``theirs``: unsloth writes that text to files that outlive the patch."""

    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return ours(*args, **kwargs)

    # Without the attributes by which torch.compile would find and inline the original.
    return functools.update_wrapper(call, theirs, updated=())


class Functions(FusedHead):
    """unsloth's functions under their names. ``Plan.max_chunk_bytes`` replaces ``rows_per_chunk`` and the like.

    Args:
        theirs: unsloth's own, for options that these kernels do not have.
        plan: how the machine computes them.
    """

    def __init__(self, theirs: Callable[..., Any], plan: Plan) -> None:
        super().__init__(plan)
        self._theirs = theirs

    def fused_linear_logprobs(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        logit_scale_multiply: float = 0.0,
        logit_scale_divide: float = 0.0,
        logit_softcapping: float = 0.0,
        entropy_requires_grad: bool | None = True,
        rows_per_chunk: int | None = None,
        max_rows_per_chunk: int | None = None,
        **wanted: bool,
    ) -> Tensor | tuple[Tensor, ...]:
        """log pi of each target, and the values of ``WANTED`` that are requested, in that order.

        Args:
            hidden: [..., D].
            weight: [V, D].
            targets: [...] int64. Outside of [0, V) a token does not count.
            bias: [V] or None.
            mask: [...], where a token counts; None for everywhere.
            temperature, logit_scale_multiply, logit_scale_divide, logit_softcapping: how logits become a distribution;
                0 for no scale and no softcap.
            entropy_requires_grad: False detaches the entropy.
            wanted: ``WANTED``, each False unless it is given.

        Returns:
            [...] float32 each, ``is_top1`` bool; 0 and False where a token does not count. The mean of the logits is
            that before the temperature.
        """
        rows, head, bias = _operands(hidden, weight, bias)
        target = _counted(targets, weight, mask)
        scale = _scale(logit_scale_multiply, logit_scale_divide)
        how = Readout(float(temperature), logit_softcapping or None, scale)
        asked = [name for name in WANTED if wanted.get(name)]
        if asked in ([], ["return_entropy"]):
            logp, entropy, _ = linear_token_stats(rows, head, target, bias=bias, readout=how, plan=self._plan)
            values = {"return_entropy": entropy}
        else:
            seen = linear_token_observations(rows, head, target, bias=bias, readout=how, plan=self._plan)
            logp, mean, top1 = seen.logp, seen.mean_logit * temperature, seen.argmax == target
            values = dict(zip(WANTED, (seen.entropy, mean, seen.log_sum_sq_probs, top1), strict=True))
        if entropy_requires_grad is False:
            values["return_entropy"] = values["return_entropy"].detach()
        result = [x.reshape(targets.shape).to(hidden.device) for x in (logp, *(values[name] for name in asked))]
        return tuple(result) if asked else result[0]

    def fused_linear_cross_entropy(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        *,
        divisor: float | Tensor,
        ignore_index: int = IGNORE,
        logit_scale_multiply: float = 0.0,
        logit_scale_divide: float = 0.0,
        logit_softcapping: float = 0.0,
        label_smoothing: float = 0.0,
        logits_bias: Tensor | None = None,
        **memory: Any,
    ) -> Tensor:
        """The sum of -log pi over the targets that count, divided; 0-dim float32.

        With ``label_smoothing`` or ``logits_bias`` it is unsloth's own.

        Args:
            hidden, weight, bias, targets, logit_*: as in ``fused_linear_logprobs``.
            divisor: of the sum; 0 counts as 1.
            ignore_index: a target that does not count.
            memory: ``scaling``, ``fp32_head_grad`` and ``rows_per_chunk``, which say how unsloth stores its gradient.
        """
        if label_smoothing or logits_bias is not None:
            readout = dict(zip(READOUT, (logit_scale_multiply, logit_scale_divide, logit_softcapping), strict=True))
            other = {"label_smoothing": label_smoothing, "logits_bias": logits_bias, "ignore_index": ignore_index}
            found: Tensor = self._theirs(hidden, weight, bias, targets, divisor=divisor, **readout, **other, **memory)
            return found
        rows, head, bias = _operands(hidden, weight, bias)
        batch = Batch(_counted(targets, weight, targets != ignore_index).unsqueeze(0))
        count = torch.as_tensor(divisor).reshape(-1)[0].to(weight.device, torch.float32)
        loss = Loss(SFT(), TokenMean(torch.where(count == 0, 1.0, count)))
        how = Readout(1.0, logit_softcapping or None, _scale(logit_scale_multiply, logit_scale_divide))
        return fused_linear_loss(rows.unsqueeze(0), head, batch, loss, bias=bias, readout=how, plan=self._plan).loss

    def chunked_selective_log_softmax(
        self, logits: Tensor, index: Tensor, temperature: float = 1.0, chunks: int = 4, **support: Any
    ) -> Tensor:
        """log pi of each index, [B, L] float32, from logits [B, L, V].

        Over a part of the vocabulary (top-k, top-p, min-p, excluded words) it is unsloth's own.
        """
        nothing = {"support_top_k": 0, "support_top_p": 1.0, "support_min_p": 0.0}
        cut = any(support.get(name, none) != none for name, none in nothing.items())
        if cut or support.get("support_excluded_ids") is not None:
            found: Tensor = self._theirs(logits, index, temperature, chunks, **support)
            return found
        return logprobs(logits, index, readout=Readout(temperature=float(temperature)), plan=self._plan)

    cpu_chunked_log_probs = FusedHead.score  # TRL's head, with TRL's arguments

    def chunked_linear_cross_entropy(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor | None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,
        chunk_rows: int | None = None,
    ) -> Tensor:
        """The mean of -log pi over the labels; 0-dim. If no label counts, unsloth's own function is called.

        Args:
            hidden: [B, L, D].
            weight: [V, D].
            labels: [B, L] int64, the tokens themselves: position t is scored against label t + 1.
            num_items_in_batch: labels of the whole step; None counts those of the batch.
            ignore_index: label of a token that does not count.
            shift_labels: [B, L] int64, labels in place of ``labels`` that are shifted already.
            chunk_rows: of unsloth's chunks.
        """
        given = labels if shift_labels is None else shift_labels
        assert given is not None
        target = torch.where(given == ignore_index, IGNORE, given)
        target = shift_targets(target) if shift_labels is None else target
        count = (target != IGNORE).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        if count.item() == 0:
            found: Tensor = self._theirs(
                hidden, weight, labels, num_items_in_batch, ignore_index, shift_labels, chunk_rows
            )
            return found
        loss = Loss(SFT(), TokenMean(count.reshape(())))
        return fused_linear_loss(hidden, weight, Batch(target.to(hidden.device)), loss, plan=self._plan).loss


def _operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """[T, D], [V, D] and [V] on the weight's device, of the weight's dtype unless autocast is on."""
    rows = hidden.reshape(-1, hidden.shape[-1]).to(weight.device)
    bias = None if bias is None else bias.reshape(-1).to(weight.device)
    if torch.is_autocast_enabled(weight.device.type) or not weight.is_floating_point():
        return rows, weight, bias
    return rows.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)


def _counted(targets: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """[T] int64, ``IGNORE`` where a token does not count."""
    counts = (targets >= 0) & (targets < len(weight))
    if mask is not None:
        counts = counts & mask.to(targets.device, torch.bool)
    return torch.where(counts, targets.long(), IGNORE).reshape(-1).to(weight.device)


def _scale(multiply: float, divide: float) -> float:
    """The factor on logits; unsloth writes 0 for none."""
    return float(multiply or 1.0) / float(divide or 1.0)
