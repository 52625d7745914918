"""Level 1 as trainers call it: log-probabilities of labels with any leading shape."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unirl_kernels.api.arguments import check_input, check_kind
from unirl_kernels.api.linear import linear_token_stats
from unirl_kernels.api.logits import token_stats
from unirl_kernels.checks import check_layout, name_of
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout


def logprobs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    readout: Readout = Readout(),
    plan: Plan = Plan(),
) -> Tensor:
    """Log-probability of each label, in one read of the logits. Replaces ``log_softmax`` + ``gather``.

        logp = z_y - log sum_j e^{z_j}

    This is ``token_stats(...).logp`` for any leading shape. It copies logits whose last dimension is not contiguous, or
    whose leading dimensions cannot be viewed as one.

    Args:
        logits: [..., V]; float32, bfloat16 or float16 (float64 for checks).
        labels: [...], integers of any width in [0, V), or ``IGNORE``: such a row is not read and gets zero gradient.
        readout: how logits become a distribution; its temperature may have one value per label.
        plan: how the machine computes it.

    Returns:
        [...] float32 (float64 for float64 logits), <= 0, nats; 0 where the label is ``IGNORE``. Differentiable in the
        logits.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``token_stats`` does.

    Examples:
        >>> logits = torch.zeros(2, 1, 3, 4)
        >>> labels = torch.tensor([[[3, 1, uk.IGNORE]], [[0, 0, 0]]], dtype=torch.int16)
        >>> uk.logprobs(logits, labels)[0]
        tensor([[-1.3863, -1.3863,  0.0000]])
    """
    rows, target, readout = _as_tokens("logits", logits, labels, readout)
    if rows.shape[-1] != 1 and rows.stride(-1) != 1:
        rows = rows.contiguous()
    return token_stats(rows, target, readout=readout, plan=plan).logp.view(labels.shape)


def linear_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    readout: Readout = Readout(),
    plan: Plan = Plan(),
) -> Tensor:
    """``logprobs`` of the logits hidden W^T + b, without a tensor of all logits.

        logp = z_y - log sum_j e^{z_j},        z = hidden W^T + b

    This is ``linear_token_stats(...).logp`` for any leading shape. It copies hidden states whose leading dimensions
    cannot be viewed as one.

    Args:
        hidden: [..., D]; as in ``linear_token_stats``.
        weight: [V, D], of hidden's dtype.
        labels: [...], integers of any width in [0, V), or ``IGNORE``.
        bias: [V], of weight's dtype, or None.
        readout: how logits become a distribution; its temperature may have one value per label.
        plan: how the machine computes it.

    Returns:
        As ``logprobs``, differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``linear_token_stats`` does.

    Examples:
        >>> hidden, weight = torch.ones(2, 1, 2, 3), torch.zeros(4, 3)
        >>> uk.linear_logprobs(hidden, weight, torch.zeros(2, 1, 2, dtype=torch.uint8))[0]
        tensor([[-1.3863, -1.3863]])
    """
    rows, target, readout = _as_tokens("hidden", hidden, labels, readout)
    return linear_token_stats(rows, weight, target, bias=bias, readout=readout, plan=plan).logp.view(labels.shape)


def _as_tokens(name: str, rows: Tensor, labels: Tensor, readout: Readout) -> tuple[Tensor, Tensor, Readout]:
    """Rows, labels and readout with leading dimensions that ``token_stats`` accepts."""
    check_input(name, rows)
    check_kind("readout", readout, Readout)
    _check_labels(name, rows, labels)
    target = labels.long()
    if labels.dtype == torch.uint64:  # values from 2^63 on would wrap around, and one of them to IGNORE
        target = torch.where(target < 0, torch.iinfo(torch.int64).max, target)
    if labels.dim() in (1, 2):
        return rows, target, readout
    temperature = readout.temperature
    if isinstance(temperature, Tensor):
        if temperature.shape != labels.shape:
            raise ValueError(f"temperature must have shape {tuple(labels.shape)}, got {tuple(temperature.shape)}")
        readout = replace(readout, temperature=temperature.reshape(-1))
    return rows.reshape(-1, rows.shape[-1]), target.reshape(-1), readout


def _check_labels(name: str, rows: Tensor, labels: object) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an integer tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {name_of(labels.dtype)}")
    check_layout("labels", labels)
    if rows.dim() == 0 or rows.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column, got shape {tuple(rows.shape)}")
    if labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(rows.shape[:-1])} like {name} without its last dimension, "
            f"got {tuple(labels.shape)}"
        )
