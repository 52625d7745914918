"""A user's own kernel or peer as a provider: ``--provider FILE.py:FUNCTION``.

The function is called with the operands and the batch:

    FUNCTION(logits, batch)             logits [B, L, V], batch a ``unirl_kernels.Batch``
    FUNCTION(hidden, weight, batch)     of a linear head: hidden [B, L, D], weight [V, D]

It returns, differentiable in the operands:

    loss, or (loss, logp)               the mean loss of the batch, 0-dim, and log-probabilities, [B, L]
    logp, or (logp, entropy)            [B, L], in the modes of statistics

The loss is ``--loss`` with its default numbers. What it returns where the target is ``IGNORE`` does not count.
A function with an attribute ``overwrites`` that is true leaves the gradients in the memory of the operands.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, Values
from benchmarks.providers import Bind, Function, Provider
from benchmarks.work import FUSED, Work
from unirl_kernels.commands.cli import CommandFailed
from unirl_kernels.commands.user_file import load

OPTION = "--provider"


def own(text: str, work: Work) -> Provider:
    """The provider that ``text`` names.

    Args:
        text: ``FILE.py:FUNCTION``.
        work: what it is to compute.

    Raises:
        CommandFailed: when the file cannot be run, or has no such function, or it takes other arguments.
    """
    function = load(text, OPTION)
    arguments = ("logits", "batch") if work.hidden is None else ("hidden", "weight", "batch")
    if not callable(function):
        raise CommandFailed(f"{OPTION} {text} must be a function, got {type(function).__name__}")
    if (taken := _signature(function)) is not None:
        try:
            taken.bind(*arguments)
        except TypeError as error:
            raise CommandFailed(f"{OPTION} {text} must take ({', '.join(arguments)}), got {taken}") from error
    file, _, name = text.rpartition(":")
    source = f"{Path(file).expanduser().resolve()}:{name}"
    return Provider(file, name, _binder(function), bool(getattr(function, "overwrites", False)), source)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """None for a function without a signature, such as those of C extensions."""
    try:
        return inspect.signature(function)
    except ValueError:
        return None


def _binder(function: Callable[..., Any]) -> Bind:
    def bind(inputs: Inputs) -> Function:
        return lambda *operands: _values(function(*operands, inputs.batch), inputs)

    return bind


def _values(returned: object, inputs: Inputs) -> Values:
    """What the function returned.

    Raises:
        TypeError: when it is not what the mode asks for.
    """
    found = returned if isinstance(returned, tuple) else (returned,)
    scores = inputs.batch.target.shape
    shapes = {"loss": torch.Size(), "logp": scores, "entropy": scores}
    del shapes["entropy" if inputs.work.mode == FUSED else "loss"]
    first, second = shapes
    if not 1 <= len(found) <= 2:
        raise TypeError(f"the function must return {first} or ({first}, {second}), got a tuple of {len(found)}")
    for (name, shape), x in zip(shapes.items(), found, strict=False):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.shape != shape:
            raise TypeError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    return Values(**dict(zip(shapes, found, strict=False)))
