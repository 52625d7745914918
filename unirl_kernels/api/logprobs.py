"""Level 1 in the form that trainers call: log-probabilities of labels of any leading shape."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unirl_kernels.api.arguments import check_input, check_kinds
from unirl_kernels.api.linear import linear_token_stats
from unirl_kernels.api.logits import token_stats
from unirl_kernels.checks import name_of
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

    It is ``token_stats(...).logp`` for any leading shape. Logits whose last dimension is not contiguous, or whose
    leading dimensions cannot be viewed as one, are copied.

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
    check_input("logits", logits)
    check_kinds(readout=readout)
    _check_labels("logits", logits, labels)
    if logits.shape[-1] != 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    target = _targets(labels)
    if labels.dim() not in (1, 2):
        logits, target, readout = logits.reshape(-1, logits.shape[-1]), target.reshape(-1), _flat(readout, labels)
    return token_stats(logits, target, readout=readout, plan=plan).logp.view(labels.shape)


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

    It is ``linear_token_stats(...).logp`` for any leading shape. Hidden states whose leading dimensions cannot be
    viewed as one are copied.

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
    check_input("hidden", hidden)
    check_kinds(readout=readout)
    _check_labels("hidden", hidden, labels)
    target = _targets(labels)
    if labels.dim() not in (1, 2):
        hidden, target, readout = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1), _flat(readout, labels)
    stats = linear_token_stats(hidden, weight, target, bias=bias, readout=readout, plan=plan)
    return stats.logp.view(labels.shape)


def _check_labels(name: str, rows: Tensor, labels: object) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an integer tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {name_of(labels.dtype)}")
    if rows.dim() == 0 or rows.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column, got shape {tuple(rows.shape)}")
    if labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(rows.shape[:-1])} like {name} without its last dimension, "
            f"got {tuple(labels.shape)}"
        )


def _targets(labels: Tensor) -> Tensor:
    target = labels.long()
    if labels.dtype == torch.uint64:  # from 2^63 on they would wrap around, one of them to IGNORE
        target = torch.where(target < 0, torch.iinfo(torch.int64).max, target)
    return target


def _flat(readout: Readout, labels: Tensor) -> Readout:
    """With a temperature per label as one per row."""
    temperature = readout.temperature
    if not isinstance(temperature, Tensor):
        return readout
    if temperature.shape != labels.shape:
        raise ValueError(f"temperature must have shape {tuple(labels.shape)}, got {tuple(temperature.shape)}")
    return replace(readout, temperature=temperature.reshape(-1))
