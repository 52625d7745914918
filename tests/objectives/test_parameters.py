"""Parameters of objectives: refused outside their range when one is made, and each of them matters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

import unirl_kernels as uk
from tests.objectives.test_by_hand import TABLE
from tests.objectives.test_variants import batch_of, data_of, fused
from tests.objectives.variants.rows import Row
from tests.objectives.variants.table import ROWS
from unirl_kernels import objectives as uo
from unirl_kernels.objectives.arguments import Parameters

EXAMPLES = {type(function): function for function, *_ in TABLE}

WITHOUT_EFFECT = {
    "CISPO.lower": "0 where there is no lower bound",
    "TruncatedRatio.low": "likewise",
    "SequenceTruncatedRatio.low": "likewise",
    "LowVarianceKL.bound": "of the defaults, which nothing reaches; a row of its own has bounds that bite",
    "LowVarianceKL.most": "likewise",
    "SimPER.beta": "of the metrics alone",
    "BetaDPO.least": "a guard",
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=lambda x: type(x).__name__)
def test_what_is_no_number_name_or_function_is_refused(example: Parameters) -> None:
    for name, allowed, _ in type(example)._ranges:
        with pytest.raises(TypeError, match=re.escape(f"{name} must be {allowed.kind}, got ")):
            replace(example, **{name: object()})
        if allowed.kind == "a number":
            with pytest.raises(ValueError, match=f"{name} must .*, got nan"):
                replace(example, **{name: float("nan")})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uo.DualClip(c=1), "c must be above 1, got 1"),
        (lambda: uo.GSPOToken(bound=81), r"bound must lie in \(0, 80\], got 81"),
        (lambda: uo.ConservativeDPO(smoothing=0.5), r"smoothing must lie in \[0, 0.5\), got 0.5"),
        (lambda: uo.EXO(smoothing=0), "smoothing must be positive, got 0"),
        (lambda: uo.Focal(-1), "gamma must be at least 0, got -1"),
        (lambda: uo.TrustTV(high=1.5), r"high must lie in \[0, 1\], got 1.5"),
        (lambda: uo.EntropyTarget(float("inf")), "target must be finite, got inf"),
        (lambda: uo.K1("a b"), "against must be an identifier, got 'a b'"),
        (lambda: uo.DPO(0.1, True, uo.ForwardKL()), r"length_normalized must be False with score=ForwardKL\(\)"),
    ],
)
def test_outside_the_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_class_is_no_objective() -> None:
    with pytest.raises(TypeError, match=r"objective must be callable, as Clip\(\) is, got <class"):
        uo.Scaled(uo.Clip, uo.TrustTV())


def numbers(x: Parameters, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, float]]:
    """Numbers of an objective and its parts: where, by which name, how much."""
    for field in fields(x):
        value = getattr(x, field.name)
        if isinstance(value, Parameters):
            yield from numbers(value, (*at, field.name))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (*at, field.name), f"{type(x).__name__}.{field.name}", value


def changed(x: Any, at: tuple[str, ...], value: float) -> Any:
    name, *rest = at
    return replace(x, **{name: changed(getattr(x, name), tuple(rest), value) if rest else value})


def matters(row: Row, objective: Parameters, at: tuple[str, ...], value: float) -> bool:
    """Whether another value gives this objective another loss or gradient on the row's batch."""
    data = data_of(row.lengths)
    batch, plan = batch_of(row, data, True), uk.Plan("eager", "composed")
    aggregation = next(term.aggregation for term in row.loss().terms if term.objective == objective)
    before = fused(data, batch, uk.Loss(objective, aggregation), plan)
    for other in (1.5 * value + 0.01, 0.5 * value, 0.9 * value):
        try:
            after = fused(data, batch, uk.Loss(changed(objective, at, other), aggregation), plan)
        except ValueError:
            continue
        if not torch.allclose(before.loss, after.loss, rtol=1e-5, atol=0):
            return True
        if not torch.allclose(before.gradients[0], after.gradients[0], rtol=1e-4, atol=1e-6):
            return True
    return False


def test_every_parameter_matters_in_some_row() -> None:
    """So that a clip that never clips, or a mask that never masks, is not taken for tested."""
    found: dict[str, bool] = {}
    for row in ROWS:
        for term in row.loss().terms:
            if isinstance(term.objective, Parameters):
                for at, name, value in numbers(term.objective):
                    if not found.get(name):
                        found[name] = matters(row, term.objective, at, value)
    assert {name for name, seen in found.items() if not seen} <= set(WITHOUT_EFFECT)
