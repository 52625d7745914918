"""A user's own objective as the loss of the bench: ``--loss FILE.py:OBJECTIVE``.

Its truth is the objective itself under autograd in fp64, on log-probabilities of the oracle.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import unirl_kernels as uk
from unirl_kernels.commands.cli import CommandFailed
from unirl_kernels.commands.explain import loss_of
from unirl_kernels.commands.user_file import load
from unirl_kernels.objectives import Tokens
from unirl_kernels.testing import oracle

OPTION = "--loss"


def loss_name(text: str) -> str:
    """The type of ``--loss``: a name in ``oracle.LOSSES``, or ``FILE.py:OBJECTIVE`` with its whole path."""
    if text in oracle.LOSSES:
        return text
    file, colon, name = text.rpartition(":")
    if not (colon and file.endswith(".py")):
        known = ", ".join(oracle.LOSSES)
        raise argparse.ArgumentTypeError(f"must be one of {known}, or FILE.py:OBJECTIVE, got {text!r}")
    return f"{Path(file).expanduser().resolve()}:{name}"


def own_loss(text: str) -> uk.Loss:
    """The loss that ``text`` names.

    Raises:
        CommandFailed: when the file cannot be run or has no such objective, or the objective needs what the bench does
            not give.
    """
    found = load(text, OPTION)
    try:
        loss = loss_of(found)
        _check(loss)
    except CommandFailed:
        raise
    except Exception as error:  # the file's own code runs here
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CommandFailed(f"{OPTION} {text}: {said}") from error
    return loss


def _check(loss: uk.Loss) -> None:
    """Try it on two sequences. Refuse a loss that reads entropy or lse, since the truth has these not for all
    tokens."""
    values = torch.full((2, 3), -1.0)
    batch = uk.Batch(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2), values, values)
    statistics = [values.clone().requires_grad_() for _ in range(3)]
    value = loss.composed(Tokens(batch, *statistics), loss.weights(batch))
    read = torch.autograd.grad(value, statistics, allow_unused=True)
    unknown = loss.composed(
        Tokens(batch, values, *(torch.full((2, 3), torch.nan) for _ in range(2))), loss.weights(batch)
    )
    if read[1] is not None or read[2] is not None or bool(unknown.isnan()):
        raise ValueError("the bench takes objectives of t.logp and the batch's advantage, old_logp and ref_logp alone")
