"""What a trainer logs and trains in a run, against two other runs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

RELATIVE = 1e-5
"""What a logged value may be off by, relative to itself; and twice what its own rounding does, against fp64 heads."""

ABSOLUTE = 1e-11
"""What any may be off by: a penalty on the distance of two equal policies is the square of a rounding."""

CLOCKS = ("runtime", "step_time", "per_second", "flos", "train_loss")


def differences(
    got: Sequence[Mapping[str, float]],
    own: Sequence[Mapping[str, float]],
    true: Sequence[Mapping[str, float]],
    others: Sequence[str] = (),
) -> list[str]:
    """In what a run is further from the one in fp64 than allowed.

    Args:
        got: what was logged, step by step.
        own: the same of the trainer's own code.
        true: of a head in fp64.
        others: endings of names that say nothing about the loss.
    """
    found = []
    assert len(got) == len(own) == len(true) >= 3
    for step, (a, b, c) in enumerate(zip(got, own, true, strict=True), 1):
        assert a.keys() == b.keys()
        for key in a:
            allowed = RELATIVE * abs(c[key]) + 2 * abs(b[key] - c[key]) + ABSOLUTE
            if not key.endswith((*CLOCKS, *others)) and not abs(a[key] - c[key]) <= allowed:
                found.append(f"{key} of step {step}: {a[key]} for {b[key]} and {c[key]}, allowed {allowed:.3g}")
    return found


class Trained(NamedTuple):
    """What a run logged, and the parameters that it trained."""

    log: list[dict[str, float]]
    parameters: Tensor

    @classmethod
    def of(cls, trainer: Any) -> Trained:
        """What transformers' trainer has after ``train()``."""
        trained = [x.detach().flatten() for x in trainer.model.parameters() if x.requires_grad]
        return cls(trainer.state.log_history, torch.cat(trained).double())


def wrong(got: Trained, own: Trained, true: Trained, others: Sequence[str] = ()) -> list[str]:
    """``differences``, and the parameters if they are further from those in fp64 than allowed."""
    off, allowed = ((run.parameters - true.parameters).norm().item() for run in (got, own))
    allowed = 2 * allowed + 2e-7 * true.parameters.norm().item()
    found = differences(got.log, own.log, true.log, others)
    return found + ([f"parameters by {off:.3g}, allowed {allowed:.3g}"] if not off <= allowed else [])
