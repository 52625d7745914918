"""verl's functions on this package's kernels, with verl's names, signatures and results.

Known is verl 0.9. ``patch()`` puts the functions where verl's own are, in ``verl.utils.torch_functional`` for its path
over logits (padding removed or not) and in ``verl.utils.kernel.linear_cross_entropy`` for ``use_fused_kernels`` with
``impl_backend: triton``, which then needs no Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.api import linear_token_stats, token_stats
from unirl_kernels.integrations.patching import Patch, Replacement, known
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout

KNOWN = "0.9"

_active: Patch | None = None


def patch() -> Patch:
    """Let verl compute log-probabilities, entropies and their gradients with this package, until ``unpatch()``.

    Call it in every worker process, before the model is built: in a module that ``VERL_USE_EXTERNAL_MODULES`` names,
    say, which verl imports in each. Patching again changes nothing. In a ``with`` statement the patch ends with the
    block.

    Returns:
        ``Patch``.

    Raises:
        ImportError: when verl is not installed, or what it needs is not.
        RuntimeError: when its version is not known, or does not have what was looked for.
    """
    global _active
    try:
        installed = version("verl")
    except PackageNotFoundError as error:
        raise ImportError("verl is not installed: pip install verl") from error
    if installed.split(".")[:2] != KNOWN.split("."):
        raise RuntimeError(f"verl must be of version {KNOWN}, got {installed}")
    unpatch()
    of_logits = importlib.import_module("verl.utils.torch_functional")
    of_hidden = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    apply = known(of_hidden, "LinearCrossEntropy", _LINEAR)[0].apply
    if getattr(of_hidden, "linear_cross_entropy", None) != apply:
        raise RuntimeError(f"looked for linear_cross_entropy = LinearCrossEntropy.apply in {of_hidden.__name__}")
    _active = Patch(
        [
            Replacement(known(of_logits, "logprobs_from_logits", _LOGPROBS)[0], logprobs_from_logits, "verl"),
            Replacement(known(of_logits, "entropy_from_logits", ("logits",))[0], entropy_from_logits, "verl"),
            Replacement(of_hidden.linear_cross_entropy, linear_cross_entropy, "verl"),
        ]
    )
    return _active


def unpatch() -> None:
    """Give verl its own functions back. Without a patch it does nothing."""
    global _active
    if _active is not None:
        _active.undo()
        _active = None


_LOGPROBS = ("logits", "labels", "inplace_backward")
_LINEAR = ("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log pi of each label.

    Args:
        logits: [..., V].
        labels: [...] int64.
        inplace_backward: let the gradient take the logits' memory, where they were computed by something that does
            not need them any more; they cannot be used after the backward. A leaf and its views are left alone.

    Returns:
        [...] float32, also for 16-bit logits.
    """
    of_leaf = logits.is_leaf or (logits._base is not None and logits._base.is_leaf)
    overwrite = inplace_backward and logits.requires_grad and not of_leaf and torch.is_grad_enabled()
    rows = logits if logits.dim() in (2, 3) else logits.reshape(-1, logits.shape[-1])
    target = labels.reshape(rows.shape[:-1])
    return token_stats(rows, target, plan=Plan(overwrite_logits=overwrite)).logp.view(logits.shape[:-1])


def entropy_from_logits(logits: Tensor) -> Tensor:
    """H of each distribution, [...] float32, from logits [..., V]."""
    rows = logits if logits.dim() in (2, 3) else logits.reshape(-1, logits.shape[-1])
    target = torch.zeros(rows.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_stats(rows, target).entropy.view(logits.shape[:-1])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """log pi of each label, and H, from hidden states and the head's weight; the logits are never formed as a whole.

    Args:
        hidden: [..., D].
        weight: [V, D].
        labels: [...] int64, T of them.
        temperature: of the logits, > 0; or, which verl's own cannot, one per label.
        reduction: of the log-probabilities: ``none``, ``sum`` or ``mean``.
        dist_process_group: of a vocabulary that is split over processes; has to be a single one.

    Returns:
        log-probabilities, [T] or 0-dim, and entropies, [T]; float32, differentiable.

    Raises:
        ValueError: when the vocabulary is split, or the reduction is not known.
    """
    if dist_process_group is not None and (n := torch.distributed.get_world_size(dist_process_group)) > 1:
        raise ValueError(f"dist_process_group must be of one process (no split vocabulary), got {n}")
    reductions: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}
    if reduction.lower() not in reductions:
        raise ValueError(f"reduction must be one of {', '.join(reductions)}, got {reduction!r}")
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(labels.shape).reshape(-1).float()
    readout = Readout(temperature=temperature)
    stats = linear_token_stats(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), readout=readout)
    return reductions[reduction.lower()](stats.logp), stats.entropy
