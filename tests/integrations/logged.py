"""What a trainer logs in a run, against two other runs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

RELATIVE = 1e-5
"""What a logged value may be off by, relative to itself; and twice what its own rounding does, against fp64 heads."""

CLOCKS = ("runtime", "per_second", "flos", "train_loss")


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
            allowed = RELATIVE * abs(c[key]) + 2 * abs(b[key] - c[key])
            if not key.endswith((*CLOCKS, *others)) and not abs(a[key] - c[key]) <= allowed:
                found.append(f"{key} of step {step}: {a[key]} for {b[key]} and {c[key]}, allowed {allowed:.3g}")
    return found
