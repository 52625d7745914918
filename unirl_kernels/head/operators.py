"""The operators of linear heads, ``torch.ops.unirl.linear_token_stats`` and ``fused_linear_loss``.

Hidden states are [T, D] and per-row tensors [B, L], with B * L = T. ``dtype`` is that of the products' operands;
``wanted`` says which of d_hidden, d_weight, d_bias are computed, and the others have no elements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from unirl_kernels import ops
from unirl_kernels.backends import ReadoutArgs, RowFields, RowGradients, RowObservations, RowStats
from unirl_kernels.head.chunks import by_tokens, without_ignored
from unirl_kernels.head.statistics import OBSERVATIONS, STATISTICS, Measurement, Rows, measure
from unirl_kernels.head.sweep import Gradients, Head, Wanted, kept_dtype, sweep

LIBRARY = torch.library.Library("unirl", "FRAGMENT")
_HEAD = "Tensor hidden, Tensor head_weight, Tensor? bias, Tensor target"
_HOW = "ScalarType dtype, int? max_chunk_bytes"

LIBRARY.define(f"linear_token_stats({_HEAD}, {ops.READOUT}, str backend, {_HOW}) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(f"linear_token_observations({_HEAD}, {ops.READOUT}, str backend, {_HOW}) -> {ops.OBSERVATIONS}")
LIBRARY.define(
    f"linear_token_stats_backward({_HEAD}, {ops.STATS}, {ops.GRADIENTS}, {ops.READOUT}, str backend, {_HOW}, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"fused_linear_loss({_HEAD}, {ops.FIELDS}, {ops.READOUT}, {ops.PROGRAM}, {_HOW}, bool[3] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

OPERATORS = ("linear_token_stats", "linear_token_observations", "linear_token_stats_backward", "fused_linear_loss")


def _without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would convert the operands of the products again."""

    @wraps(operator)
    def run(hidden: Tensor, *args: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return operator(hidden, *args)

    return run


@_without_autocast
def _linear_token_stats(*args: Any) -> RowStats:
    return _measured(STATISTICS, *args)


@_without_autocast
def _linear_token_observations(*args: Any) -> RowObservations:
    return _measured(OBSERVATIONS, *args)


def _measured(
    what: Measurement[Rows], hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any
) -> Rows:
    readout, (backend, dtype, max_chunk_bytes) = ReadoutArgs(*args[:4]), args[4:]
    ops.check_targets(target, weight.shape[0])
    head = Head(hidden, weight, bias, dtype, backend)
    if max_chunk_bytes is not None:
        head.rows_per_chunk(max_chunk_bytes)  # what the backward would refuse is refused here
    rows = measure(what, head, target.reshape(-1), readout, max_chunk_bytes)
    return what.rows(*(x.view(target.shape) for x in rows))


@_without_autocast
def _linear_token_stats_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any
) -> Gradients:
    stats, gradients, readout = RowStats(*args[:3]), RowGradients(*args[3:6]), ReadoutArgs(*args[6:10])
    backend, dtype, max_chunk_bytes, wanted = args[10:]
    head = Head(without_ignored(hidden, target.reshape(-1)), weight, bias, dtype, backend)
    chunks = by_tokens(target.reshape(-1), head.rows_per_chunk(max_chunk_bytes))

    def work(logits: Tensor, d_logits: Tensor, k: int) -> None:
        chunk = chunks[k]
        at, of_stats, how = chunk.rows(stats), chunk.rows(gradients), chunk.rows(readout)
        head.kernels.token_stats_backward(logits, chunk.row(target), at, of_stats, how, d_logits)

    return sweep(head, chunks, work, Wanted(*wanted))


@_without_autocast
def _fused_linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    fields, readout = RowFields(*args[:4]), ReadoutArgs(*args[4:8])
    program, params, backend, kernel, dtype, max_chunk_bytes, wanted = args[8:]
    ops.check_targets(target, weight.shape[0])
    head = Head(without_ignored(hidden, target.reshape(-1)), weight, bias, dtype, backend)
    chunks = by_tokens(target.reshape(-1), head.rows_per_chunk(max_chunk_bytes))
    losses = []
    logp, entropy = (hidden.new_zeros(target.numel(), dtype=head.row_dtype) for _ in range(2))

    def work(logits: Tensor, d_logits: Tensor, k: int) -> None:
        at, of_rows, how = chunks[k].row(target), chunks[k].rows(fields), chunks[k].rows(readout)
        rows = head.kernels.fused_loss(logits, at, of_rows, how, ops.decoded(program), params, d_logits, kernel)
        losses.append(rows.loss.sum())
        chunks[k].put(logp, rows.logp.squeeze(0))
        chunks[k].put(entropy, rows.entropy.squeeze(0))

    gradients = sweep(head, chunks, work, Wanted(*wanted))
    loss = torch.stack(losses).sum() if losses else logp.new_zeros(())
    return loss, logp.view(target.shape), entropy.view(target.shape), *gradients


for _name in OPERATORS:
    LIBRARY.impl(_name, globals()[f"_{_name}"], "CompositeExplicitAutograd")


def _rows(target: Tensor, dtype: torch.dtype) -> Tensor:
    return target.new_empty(target.shape, dtype=torch.promote_types(dtype, torch.float32))


def _gradients_like(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> tuple[Tensor, ...]:
    vocab, d = weight.shape
    d_hidden = hidden.new_empty(hidden.shape[0] if wanted[0] else 0, d, dtype=kept_dtype(hidden))
    d_weight = weight.new_empty(vocab if wanted[1] else 0, d, dtype=kept_dtype(weight))
    d_bias = weight.new_empty(vocab if wanted[2] else 0, dtype=kept_dtype(weight if bias is None else bias))
    return d_hidden, d_weight, d_bias


@torch.library.register_fake("unirl::linear_token_stats", lib=LIBRARY)
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _rows(target, args[-2]), _rows(target, args[-2]), _rows(target, args[-2])


@torch.library.register_fake("unirl::linear_token_observations", lib=LIBRARY)
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return *(_rows(target, args[-2]) for _ in RowObservations._fields[:-1]), torch.empty_like(target)


@torch.library.register_fake("unirl::linear_token_stats_backward", lib=LIBRARY)
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _gradients_like(hidden, weight, bias, args[-1])


@torch.library.register_fake("unirl::fused_linear_loss", lib=LIBRARY)
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    row = _rows(target, args[-3])
    return row.new_empty(()), row, _rows(target, args[-3]), *_gradients_like(hidden, weight, bias, args[-1])
