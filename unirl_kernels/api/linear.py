"""Levels 1 and 2 on hidden states and the weight of a linear head: the logits exist in chunks only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unirl_kernels.api.arguments import (
    check_device,
    check_kinds,
    check_numbers,
    check_places,
    check_targets,
    check_whole,
    kernel_of,
    name_of,
    places,
    readout_arguments,
    row_fields,
    row_weights,
)
from unirl_kernels.api.outputs import LossOutput, TokenObservations, TokenStats
from unirl_kernels.backends import COMPOSED, choose
from unirl_kernels.batch import Batch, check_dtype
from unirl_kernels.head import ComposedLinear, Composition, Group, Head, OnePassLinear, by_units
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout


def linear_token_stats(
    hidden: Tensor,  # [B, L, D] or [T, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [B, L] or [T]
    *,
    bias: Tensor | None = None,  # [V]
    readout: Readout = Readout(),
    plan: Plan = Plan(),
) -> TokenStats:
    """``token_stats`` of the logits hidden W^T + b, which are never formed as a whole.

        lse = log sum_j e^{z_j}        logp = z_y - lse        H = lse - sum_j p_j z_j,        p = softmax(z)

    One matrix product, in tiles of tokens by vocabulary that are not kept; the backward makes the logits again and
    takes three.

    Args:
        hidden: [B, L, D] or [T, D]; float32, bfloat16 or float16 (float64 for checks). Under autocast the products
            have operands of its dtype; their results are float32 in any case.
        weight: [V, D], of hidden's dtype.
        target: [B, L] or [T] int64 in [0, V), or ``IGNORE``: such a token is left out of the products, and gets zero
            gradient.
        bias: [V], of weight's dtype, or None.
        readout: how logits become a distribution.
        plan: how the machine computes it; ``max_chunk_bytes`` bounds the memory for logits.

    Returns:
        ``TokenStats``, differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: when an argument does not fit, naming it, what was expected and what came.
        IndexError: when a target is outside the vocabulary (on the CPU; on an accelerator its row becomes NaN).
        RuntimeError: when the named backend cannot run here.
    """
    head = _head(hidden, weight, bias, target, plan)
    return TokenStats(*_measured("linear_token_stats", head, target, readout, plan))


def linear_token_observations(
    hidden: Tensor,  # [B, L, D] or [T, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [B, L] or [T]
    *,
    bias: Tensor | None = None,  # [V]
    readout: Readout = Readout(),
    plan: Plan = Plan(),
) -> TokenObservations:
    """``token_observations`` of the logits hidden W^T + b, which are never formed as a whole.

        log_sum_sq_probs = log sum_j p_j^2        mean_logit = 1/V sum_j z_j        argmax = min argmax_j z_j

    and logp, entropy and lse as in ``linear_token_stats``, at its cost. The logits are those of the products: where two
    of them are equal but for rounding, which of them is the larger is the products' choice.

    Args:
        hidden: [B, L, D] or [T, D]; float32, bfloat16 or float16 (float64 for checks). Under autocast the products
            have operands of its dtype; their results are float32 in any case.
        weight: [V, D], of hidden's dtype.
        target: [B, L] or [T] int64 in [0, V), or ``IGNORE``: such a token is left out of the products, and gets zero
            gradient.
        bias: [V], of weight's dtype, or None.
        readout: how logits become a distribution, and what z is.
        plan: how the machine computes it; ``max_chunk_bytes`` bounds the memory for logits.

    Returns:
        ``TokenObservations``; logp, entropy and lse are differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: when an argument does not fit, naming it, what was expected and what came.
        IndexError: when a target is outside the vocabulary (on the CPU; on an accelerator its row becomes NaN, its
            argmax -1).
        RuntimeError: when the named backend cannot run here.
    """
    head = _head(hidden, weight, bias, target, plan)
    return TokenObservations.of_rows(_measured("linear_token_observations", head, target, readout, plan))


def _measured(operator: str, head: Head, target: Tensor, readout: Readout, plan: Plan) -> list[Tensor]:
    """What an operator finds in each row, in target's shape."""
    rows = (places(target), *readout_arguments(readout, target, head.row_dtype))
    how = (head.backend, head.dtype, plan.max_chunk_bytes)
    found = getattr(torch.ops.unirl, operator)(head.hidden, head.weight, head.bias, *rows, *how)
    return [x.view(target.shape) for x in found]


def fused_linear_loss(
    hidden: Tensor,  # [B, L, D] or [T, D]
    weight: Tensor,  # [V, D]
    batch: Batch,
    loss: Loss,
    *,
    bias: Tensor | None = None,  # [V]
    readout: Readout = Readout(),
    plan: Plan = Plan(),
) -> LossOutput:
    """``fused_loss`` of the logits hidden W^T + b, which are never formed as a whole.

    Logits exist for a chunk of tokens at a time, in float32, are replaced by their gradient in one pass, and give the
    gradients of hidden states, weight and bias at once: three matrix products in all. An objective of sequence or pair
    scope takes as many where its sequences or pairs fit a chunk, and four (statistics first) where one does not or
    under ``torch.compile``; ``explain`` says which. Gradients that nothing requires are not computed.

    Args:
        hidden: [B, L, D] or [T, D], as ``batch.target`` is laid out; float32, bfloat16 or float16 (float64 for
            checks). Under autocast the products have operands of its dtype; their results, the logits and the sum of
            the weight's gradient over the chunks are float32 in any case.
        weight: [V, D], of hidden's dtype.
        batch: what to learn from. Ignored tokens are left out of the products.
        loss: objective and aggregation.
        bias: [V], of weight's dtype, or None.
        readout: how logits become a distribution.
        plan: how the machine computes it; ``max_chunk_bytes`` bounds the memory for logits.

    Returns:
        ``LossOutput``, its loss differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: when an argument does not fit, naming it, what was expected and what came; when the
            objective reads a field that the batch lacks, or uses an operation that the kernel cannot run.
        IndexError: when a target is outside the vocabulary (on the CPU; on an accelerator its row becomes NaN).
        RuntimeError: when the named backend cannot run here.
    """
    check_kinds(batch=batch, loss=loss, readout=readout, plan=plan)
    head = _head(hidden, weight, bias, batch.target, plan)
    kernel = kernel_of(loss, plan, hidden.device).kernel
    if any(_wanted(head)):
        if kernel != COMPOSED:
            return _one_pass(head, batch, loss, readout, plan, kernel)
        if groups := _groups(head, batch, loss, plan):
            readout_args = readout_arguments(readout, batch.target, head.row_dtype)
            composition = Composition(batch, loss, groups, readout_args, head.dtype, head.backend)
            return _output(ComposedLinear.apply(head.hidden, weight, bias, composition), batch, loss)
    stats = linear_token_stats(hidden, weight, batch.target, bias=bias, readout=readout, plan=plan)
    value = loss.composed(Tokens(batch, *stats), loss.aggregation.weights(batch))
    return LossOutput(value, stats.logp.detach(), stats.entropy.detach(), batch, loss)


def _one_pass(head: Head, batch: Batch, loss: Loss, readout: Readout, plan: Plan, kernel: str) -> LossOutput:
    traced = loss.traced
    weights, fields = row_weights(loss, batch, head.row_dtype), row_fields(traced.reads, batch, head.row_dtype)
    program = (traced.code, loss.params(head.weight.device), head.backend, kernel)
    how = (head.dtype, plan.max_chunk_bytes, _wanted(head))
    rows = (places(batch.target), weights, *fields, *readout_arguments(readout, batch.target, head.row_dtype))
    args = (*rows, *program, *how)
    return _output(OnePassLinear.apply(head.hidden, head.weight, head.bias, *args), batch, loss)


def _groups(head: Head, batch: Batch, loss: Loss, plan: Plan) -> Sequence[Group] | None:
    """What to work on together; None where that cannot be, and the statistics of all tokens have to come first."""
    if torch.compiler.is_compiling():  # it cannot follow an objective inside an autograd function
        return None
    return by_units(batch, loss.scope, head.rows_per_chunk(plan.max_chunk_bytes))


def _output(values: tuple[Tensor, Tensor, Tensor], batch: Batch, loss: Loss) -> LossOutput:
    value, logp, entropy = values
    shape = batch.target.shape
    return LossOutput(value, logp.view(shape), entropy.view(shape), batch, loss)


def _wanted(head: Head) -> list[bool]:
    inputs = (head.hidden, head.weight, head.bias)
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, plan: Plan) -> Head:
    """The head, its hidden states as [T, D], with its arguments checked."""
    check_dtype("target", target, torch.int64)
    inputs: dict[str, object] = {"hidden": hidden, "weight": weight}
    if bias is not None:
        inputs["bias"] = bias
    for name, value in inputs.items():
        check_whole(name, value)
        check_device(name, check_numbers(name, value), target.device, "target")
    check_places("hidden", hidden, target, "D")
    _check_shapes(hidden, weight, bias)
    check_targets(target, weight.shape[0])
    dtype = _operand_dtype(hidden, weight, bias)
    backend = choose(hidden.device, plan.backend, plan.kernel).backend
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, dtype, backend)


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    d = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != d:
        hint = "; it looks transposed" if weight.dim() == 2 and weight.shape[0] == d else ""
        raise ValueError(f"weight must have shape (V, {d}) for hidden of D = {d}, got {tuple(weight.shape)}{hint}")
    if 0 in weight.shape:
        raise ValueError(f"weight must have at least one row and column, got shape {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _operand_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Of the products' operands: autocast's where it is on, else that of hidden, which all must have."""
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(hidden.device.type)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise ValueError(
                f"{name} must be {name_of(hidden.dtype)} like hidden unless autocast is on, got {name_of(value.dtype)}"
            )
    return hidden.dtype
