"""The table of backends: each row is a module with the same few functions, loaded when first used.

A backend module offers

    KERNELS                names of its one-pass kernels
    kernels_by_vocab       the default kernels, each with the longest row that it takes
    unavailable(device)    None, or the reason why it cannot run there
    token_stats            statistics and moments of each row, one read of the logits
    token_observations     the same, and observations of each row, from the same read
    token_stats_backward   gradient of the logits from the row's moments and the gradients of its statistics, one read
                           and one write
    fused_loss             statistics, objective and gradient of each row, one read and one write
    matmuls                the matmuls of a linear head
    empty                  uninitialised memory for a vocabulary-sized tensor
    release_memory         free the memory that ``empty`` keeps for reuse
    scale_                 multiply a gradient by a scalar; free if the scalar is 1

with the signatures of ``Backend``. Shapes: logits are [B, L, V] with any strides, the last one 1; values per row are
[B, L] and contiguous. The packed layout is B = 1. Statistics, moments and fields are fp32, or fp64 for fp64 logits.

Targets. A row whose target is ``IGNORE`` is not read: its statistics and loss are 0, its gradient is exactly 0, its
argmax is -1. A row whose target is ``ELSEWHERE`` belongs to a shard, and another shard holds the target's column: it is
read, its moments have u_y = -inf, and its gradient has no target column. A row with any other target outside [0, V)
gets NaN everywhere, and argmax -1. If the target's logit is -inf, the log-probability is -inf, and the gradient is the
one that autograd gives log_softmax and gather: d_logp (1 - p_y) = d_logp at the target, -d_logp p_j elsewhere.

A logit of -inf has probability and gradient 0. Always logp <= 0 and H >= 0. A backend whose matmuls take bf16 may ask
for gradients of fp32 logits in bf16; they are rounded once.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from unirl_kernels.backends.matmuls import Matmuls

ELSEWHERE = torch.iinfo(torch.int64).min
"""Target of a shard's row if another shard holds the target's column. Users cannot pass this number."""


class ReadoutArgs(NamedTuple):
    """How raw logits x become log-probabilities: z = softcap * tanh(scale * x / softcap) / temperature.

    Kernels use z = kappa u with kappa > 0: u = x, or -x for a negative scale, or tanh(scale x / softcap); kappa =
    |scale| / temperature, or softcap / temperature.
    """

    scale: float
    softcap: float | None
    temperature: float
    row_temperature: Tensor | None  # [B, L]; replaces temperature


class RowStats(NamedTuple):
    logp: Tensor  # [B, L]
    entropy: Tensor  # [B, L]
    lse: Tensor  # [B, L]


class RowMoments(NamedTuple):
    """Sums over a row or a shard of it, relative to its largest u. Statistics and gradients are computed from them, and
    not from lse, whose rounding loses digits."""

    top: Tensor  # [B, L]; m = max_j u_j; -inf if all logits are -inf
    s_minus_1: Tensor  # [B, L]; sum_j e^(kappa (u_j - m)) - 1; -1 if all logits are -inf
    sz: Tensor  # [B, L]; sum_j e^(kappa (u_j - m)) kappa (u_j - m), <= 0
    u_target: Tensor  # [B, L]; u_y; -inf if the target is ELSEWHERE


class Measured(NamedTuple):
    stats: RowStats
    moments: RowMoments


class RowObservations(NamedTuple):
    """Further results of the statistics' sweep, without a gradient."""

    log_sum_sq_probs: Tensor  # [B, L]; log sum_j p_j^2, <= 0
    mean_logit: Tensor  # [B, L]; mean of z_j; -inf if one is -inf
    # Of the raw logits, since z rounds: x_j, or -x_j for a negative scale. NaN and -1 in a row with NaN or inf.
    largest: Tensor  # [B, L]; max_j
    argmax: Tensor  # [B, L] int64; the first column with the largest


class Observed(NamedTuple):
    stats: RowStats
    moments: RowMoments
    observations: RowObservations


class RowGradients(NamedTuple):
    """Gradients of the loss with respect to a row's statistics; None is zero."""

    d_logp: Tensor | None  # [B, L]
    d_entropy: Tensor | None  # [B, L]
    d_lse: Tensor | None  # [B, L]


class ProgramArgs(NamedTuple):
    """The scalar program of a loss, and its inputs other than the statistics."""

    text: str  # see ``Program.text``
    fields: Tensor  # [n_fields, B, L] contiguous, in the dtype of the statistics
    params: Tensor  # [n_params] float64


class FusedRows(NamedTuple):
    loss: Tensor  # [B, L], weighted
    logp: Tensor  # [B, L]
    entropy: Tensor  # [B, L]
    lse: Tensor  # [B, L]


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all computation on rows: fp32, or fp64 for fp64 logits."""
    return torch.promote_types(dtype, torch.float32)


def rows_like(target: Tensor, dtype: torch.dtype, n: int) -> list[Tensor]:
    """Uninitialised memory for n values of each row, for logits of a dtype."""
    computed = row_dtype(dtype)
    # empty_like takes half the time of torch.empty with a shape and a device.
    return [torch.empty_like(target, dtype=computed, memory_format=torch.contiguous_format) for _ in range(n)]


def measured_like(target: Tensor, dtype: torch.dtype) -> Measured:
    logp, entropy, lse, *moments = rows_like(target, dtype, len(RowStats._fields) + len(RowMoments._fields))
    return Measured(RowStats(logp, entropy, lse), RowMoments._make(moments))


def observed_like(target: Tensor, dtype: torch.dtype) -> Observed:
    values = rows_like(target, dtype, len(RowObservations._fields) - 1)
    observations = RowObservations._make((*values, torch.empty_like(target)))
    return Observed(*measured_like(target, dtype), observations)


class Backend(Protocol):
    KERNELS: tuple[str, ...]

    def unavailable(self, device: torch.device) -> str | None: ...

    def kernels_by_vocab(self, device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, int], ...]: ...

    def token_stats(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured: ...

    def token_observations(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Observed: ...

    def token_stats_backward(
        self,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        moments: RowMoments,
        gradients: RowGradients,
        d_logits: Tensor,  # [B, L, V], written; may be ``logits`` itself
    ) -> None: ...

    def fused_loss(
        self,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        program: ProgramArgs,
        d_logits: Tensor,  # [B, L, V], written; may be ``logits`` itself
        kernel: str,
    ) -> FusedRows: ...

    def matmuls(self, weight: Tensor, dtype: torch.dtype) -> Matmuls: ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor: ...

    def release_memory(self) -> int: ...

    def scale_(self, x: Tensor, factor: Tensor) -> None: ...


MODULES = {
    "cpu": f"{__name__}.cpu",
    "triton": f"{__name__}.triton",
    "cuda": f"{__name__}.cuda",
    "eager": f"{__name__}.eager",
}
"""Backends in the order of preference."""

COMPOSED = "composed"
"""The kernel that every backend has: statistics, then the objective under autograd, then the gradient."""


@cache
def load(name: str) -> Backend:
    """The module of a backend.

    Raises:
        ValueError: when there is no backend of that name.
    """
    if name not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(MODULES)}, got {name!r}")
    return cast(Backend, importlib.import_module(MODULES[name]))


def unavailable(name: str, device: torch.device) -> str | None:
    """None when the backend runs on ``device``, else the reason why not."""
    return load(name).unavailable(device)


class Choice(NamedTuple):
    backend: str
    kernel: str


INSTEAD = {("triton", "split_row"): Choice("cuda", "cluster")}
"""Default kernels that another backend's kernel replaces. Both read a row once; the other one is predicted to be faster
and waits for no other program."""


def choose(device: torch.device, backend: str | None, kernel: str | None) -> Choice:
    """The backend and kernel to use on ``device``: the named ones, else the best backend and the first of its kernels.

    Raises:
        ValueError: when there is no backend or kernel of that name.
        RuntimeError: when the named backend cannot run there, with the reason.
    """
    if backend is None:
        backend = _best(device)
    elif reason := unavailable(backend, device):
        raise RuntimeError(f"backend {backend!r} cannot run on {device}: {reason}")
    kernels = (*load(backend).KERNELS, COMPOSED)
    if kernel is not None and kernel not in kernels:
        raise ValueError(f"kernel of backend {backend!r} must be one of {', '.join(kernels)}, got {kernel!r}")
    return Choice(backend, kernel or kernels[0])


def choices_by_vocab(
    device: torch.device, backend: str | None, kernel: str | None, dtype: torch.dtype
) -> tuple[tuple[Choice, int], ...]:
    """The one-pass kernels for ``device``, each with the longest row that it takes: the named ones, else the defaults
    of
    the best backend for logits of ``dtype``.

    Raises:
        ValueError, RuntimeError: as ``choose`` does.
    """
    named = choose(device, backend, kernel)
    if kernel is not None:
        return ((named, sys.maxsize),)
    return _by_vocab(device, named.backend, dtype, backend is None)


@cache
def _by_vocab(device: torch.device, backend: str, dtype: torch.dtype, others: bool) -> tuple[tuple[Choice, int], ...]:
    """A backend's kernels. A better kernel of another backend (``INSTEAD``) comes first, if that backend runs."""
    found: list[tuple[Choice, int]] = []
    for name, most in load(backend).kernels_by_vocab(device, dtype):
        other = INSTEAD.get((backend, name)) if others else None
        if other is not None and unavailable(other.backend, device) is None:
            found.append((other, dict(load(other.backend).kernels_by_vocab(device, dtype))[other.kernel]))
        found.append((Choice(backend, name), most))
    found[-1] = found[-1][0], sys.maxsize  # the last one takes all longer rows, or raises with the reason
    return tuple(found)


def told(choices: Sequence[tuple[Choice, int]]) -> str:
    """``choices_by_vocab`` as text."""
    texts: list[str] = []
    reached = 0
    for choice, most in choices:
        end = " beyond" if texts and most == sys.maxsize else "" if most == sys.maxsize else f" up to V = {most}"
        if most > reached:
            texts.append(f"{choice.backend} {choice.kernel}{end}")
        reached = max(reached, most)
    return ", ".join(texts)


# Set by hand what torch.compiler.assume_constant_result sets: calling it imports torch.compile, 1.2 s. Callers read the
# fields of the result, since torch.compile of torch 2.11 cannot unpack such a constant.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
choices_by_vocab._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _best(device: torch.device) -> str:
    """The first backend of the table that runs on ``device``. A slow one gives a warning."""
    reasons = {}
    for name in MODULES:
        reason = unavailable(name, device)
        if reason is None:
            break
        reasons[name] = reason
    if name == "eager" and device.type != "meta":
        why = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
        warnings.warn(f"unirl_kernels takes the slow backend 'eager' on {device} ({why})", RuntimeWarning, stacklevel=4)
    return name
