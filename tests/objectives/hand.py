"""Tokens with probabilities that people can calculate with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

import unirl_kernels as uk
from unirl_kernels.objectives import Tokens

L = math.log(2)
Numbers = Sequence[float]


def tokens(
    p: Numbers,
    lengths: Sequence[int] | None = None,
    entropy: Numbers | None = None,
    lse: Numbers | None = None,
    pairs: str = "halves",
    **fields: Numbers | float,
) -> Tokens:
    """Tokens of probabilities ``p``; each its own sequence unless ``lengths`` says how many belong together.

    ``old``, ``ref``, ``rollout`` and ``teacher`` are probabilities, too; other fields are numbers of tokens or
    sequences, or one for all.
    """
    of = list(lengths or [1] * len(p))
    target = torch.full((len(of), max(of)), uk.IGNORE)
    counted = torch.arange(max(of)) < torch.tensor(of).unsqueeze(-1)
    target[counted] = 0

    def placed(x: Numbers | float) -> torch.Tensor:
        """In target's shape where it is of tokens; padding holds zeros."""
        values = torch.tensor(x)
        if values.dim() == 0 or len(values) == len(of):
            return values
        return torch.zeros(target.shape, dtype=values.dtype).masked_scatter(counted, values)

    logs = {name: [math.log(x) for x in fields.pop(name)] for name in POLICIES if name in fields}
    given = {f"{name}_logp": placed(x) for name, x in logs.items()} | {name: placed(x) for name, x in fields.items()}
    known = {name: given.pop(name) for name in ("advantage", "old_logp", "ref_logp") if name in given}
    for name in ("old_logp", "ref_logp"):
        if name in known:
            known[name] = known[name].reshape(len(of), -1).expand(target.shape)
    batch = uk.Batch(target, **known, fields=given, pairs=pairs)
    zeros = [0.0] * len(p)
    stats = ([math.log(x) for x in p], entropy or zeros, lse or zeros)
    return Tokens(batch, *(placed(x).reshape(len(of), -1).double().expand(target.shape) for x in stats))


POLICIES = ("old", "ref", "rollout", "teacher")
