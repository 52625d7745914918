"""The table of backends: each row is a module with the same few functions, loaded when first used.

A backend module offers

    KERNELS                names of its one-pass kernels, the default first
    unavailable(device)    None, or the reason why it cannot run there
    token_stats            statistics of each row, one read of the logits
    token_observations     the same, and what else can be observed of a row in that read
    token_stats_backward   gradient of the logits from gradients of the statistics, one read and one write
    fused_loss             statistics, objective and gradient of each row, one read and one write
    products               the matrix products of a linear head
    empty                  uninitialised memory for a vocabulary-sized tensor
    release_memory         give back what ``empty`` keeps for reuse, where it keeps any
    scale_                 multiply a gradient by a scalar, free where the scalar is 1

with the signatures of ``Backend``. Shapes throughout: logits [B, L, V] with any strides and the last one 1;
everything per row [B, L] and contiguous. The packed layout is B = 1. Statistics and fields are fp32, fp64 for
fp64 logits. A row whose target is ``IGNORE`` is not read: its statistics and loss are 0, its gradient exact zeros.
A row whose target is otherwise outside [0, V) gets NaN everywhere. The argmax of both is -1. A logit of -inf is a
word that cannot come: its probability and its gradient are 0. Gradients of fp32 logits may be asked for in bf16 by a
backend whose products take them so; they are rounded once. As a target it has log-probability -inf and what autograd
gives log_softmax and gather: d_logp (1 - p_y) = d_logp at the target itself, -d_logp p_j elsewhere.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from unirl_kernels.backends.products import Products


class ReadoutArgs(NamedTuple):
    """How raw logits x become log-probabilities: z = softcap * tanh(scale * x / softcap) / temperature."""

    scale: float
    softcap: float | None
    temperature: float
    row_temperature: Tensor | None  # [B, L]; replaces temperature


class RowStats(NamedTuple):
    logp: Tensor  # [B, L]
    entropy: Tensor  # [B, L]
    lse: Tensor  # [B, L]


class RowObservations(NamedTuple):
    logp: Tensor  # [B, L]
    entropy: Tensor  # [B, L]
    lse: Tensor  # [B, L]
    log_sum_sq_probs: Tensor  # [B, L]; log sum_j p_j^2, <= 0
    mean_logit: Tensor  # [B, L]; mean of z_j, which is -inf where one is
    # Logits as they came, since z rounds: x_j, or -x_j under a negative scale. NaN and -1 in a row with NaN or inf.
    largest: Tensor  # [B, L]; max_j
    argmax: Tensor  # [B, L] int64; the first column with it


class RowGradients(NamedTuple):
    """Gradients of the loss with respect to a row's statistics; None is zero."""

    d_logp: Tensor | None  # [B, L]
    d_entropy: Tensor | None  # [B, L]
    d_lse: Tensor | None  # [B, L]


class RowFields(NamedTuple):
    """What the objective reads of a row besides its statistics. ``old_logp`` None: on policy, the row's own logp."""

    weight: Tensor  # [B, L]
    advantage: Tensor | None  # [B, L]
    old_logp: Tensor | None  # [B, L]
    ref_logp: Tensor | None  # [B, L]


class FusedRows(NamedTuple):
    loss: Tensor  # [B, L], weighted
    logp: Tensor  # [B, L]
    entropy: Tensor  # [B, L]


class Backend(Protocol):
    KERNELS: tuple[str, ...]

    def unavailable(self, device: torch.device) -> str | None: ...

    def token_stats(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowStats: ...

    def token_observations(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowObservations: ...

    def token_stats_backward(
        self,
        logits: Tensor,
        target: Tensor,
        stats: RowStats,
        gradients: RowGradients,
        readout: ReadoutArgs,
        d_logits: Tensor,  # [B, L, V], written; may be ``logits`` itself
    ) -> None: ...

    def fused_loss(
        self,
        logits: Tensor,
        target: Tensor,
        fields: RowFields,
        readout: ReadoutArgs,
        code: Sequence[int],
        params: Tensor,  # [n_params] float64
        d_logits: Tensor,  # [B, L, V], written; may be ``logits`` itself
        kernel: str,
    ) -> FusedRows: ...

    def products(self, weight: Tensor, dtype: torch.dtype) -> Products: ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor: ...

    def release_memory(self) -> int: ...

    def scale_(self, x: Tensor, factor: Tensor) -> None: ...


MODULES = {
    "cpu": "unirl_kernels.backends.cpu",
    "triton": "unirl_kernels.backends.triton",
    "cuda": "unirl_kernels.backends.cuda",
    "eager": "unirl_kernels.backends.eager",
}
"""Backends in the order of preference."""

COMPOSED = "composed"
"""The kernel that every backend has: statistics, then the objective under autograd, then the gradient."""


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


def choose(device: torch.device, backend: str | None, kernel: str | None) -> Choice:
    """The backend and kernel to use on ``device``: the named ones, else the best backend's default.

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


# The mark of torch.compiler.assume_constant_result, which would import all of torch.compile to set it: 1.2 s.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _best(device: torch.device) -> str:
    """The first backend of the table that runs on ``device``; a slow one does not step in without a word."""
    reasons = {}
    for name in MODULES:
        reason = unavailable(name, device)
        if reason is None:
            break
        reasons[name] = reason
    if name == "eager":
        why = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
        warnings.warn(f"unirl_kernels takes the slow backend 'eager' on {device} ({why})", RuntimeWarning, stacklevel=4)
    return name
