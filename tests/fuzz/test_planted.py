"""Faults planted in the package: the search must find each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import unirl_kernels as uk
from tests.fuzz.case import make
from tests.fuzz.run import run
from unirl_kernels.backends import cpu
from unirl_kernels.backends.groups import Measured, RowGradients
from unirl_kernels.program import Op
from unirl_kernels.program.derive import RULES

CASES = 300
"""In which a fault has to show."""

Change = Callable[[pytest.MonkeyPatch], None]


def _around(name: str, change: Callable[..., Any]) -> Change:
    """A function of the native backend with something around it."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(cpu, name)
        patch.setattr(cpu, name, lambda *args: change(original, *args))

    return plant


def _gradients(of: Callable[[RowGradients], RowGradients]) -> Change:
    """The backward of the statistics with other upstream gradients."""

    def changed(original: Any, logits: Any, target: Any, readout: Any, moments: Any, given: Any, d_logits: Any) -> None:
        original(logits, target, readout, moments, of(given), d_logits)

    return _around("token_stats_backward", changed)


def _readout(**changes: Any) -> Change:
    """The one-pass kernel without a part of the readout."""

    def changed(original: Any, logits: Any, target: Any, readout: Any, *rest: Any) -> Any:
        return original(logits, target, readout._replace(**changes), *rest)

    return _around("fused_loss", changed)


def _after_gradient(name: str, change: Callable[[Tensor, Tensor], None]) -> Change:
    """A fault: ``change`` is applied to the gradient of the logits."""

    def changed(original: Any, logits: Any, target: Any, *rest: Any) -> Any:
        result = original(logits, target, *rest)
        d_logits = next(x for x in reversed(rest) if isinstance(x, Tensor))
        change(d_logits, target)
        return result

    return _around(name, changed)


def _statistics(of: Callable[[Measured], Measured]) -> Change:
    return _around("token_stats", lambda original, *args: of(original(*args)))


def _rounded(measured: Measured) -> Measured:
    logp = measured.stats.logp
    return measured._replace(stats=measured.stats._replace(logp=logp.bfloat16().to(logp.dtype)))


def _written_twice(d_logits: Tensor, target: Tensor) -> None:
    """The target's entry is read, changed and written once more in the dtype of the logits."""
    at = target.clamp(min=0).unsqueeze(-1)
    entry = d_logits.gather(-1, at)
    d_logits.scatter_(-1, at, (entry + 1) - 1)


def _rule(op: Op, rule: Any) -> Change:
    return lambda patch: patch.setitem(RULES, op, rule)


def _weights(patch: pytest.MonkeyPatch) -> None:
    original = uk.SequenceMean.weights
    patch.setattr(uk.SequenceMean, "weights", lambda self, batch: original(uk.SequenceMean(self.count), batch))


FAULTS: dict[str, Change] = {
    "sign of the entropy's gradient": _gradients(
        lambda g: g._replace(d_entropy=None if g.d_entropy is None else -g.d_entropy)
    ),
    "gradient of lse dropped": _gradients(lambda g: g._replace(d_lse=None)),
    "gradient of logp a thousandth too large": _gradients(
        lambda g: g._replace(d_logp=None if g.d_logp is None else g.d_logp * 1.001)
    ),
    "softcap forgotten": _readout(softcap=None),
    "temperature of tokens forgotten": _readout(row_temperature=None),
    "scale forgotten": _readout(scale=1.0),
    "last column left out": _after_gradient("fused_loss", lambda d, target: d[..., -1:].zero_()),
    "ignored rows written": _after_gradient(
        "token_stats_backward", lambda d, target: d.masked_fill_((target == uk.IGNORE).unsqueeze(-1), 1e-9)
    ),
    "target's entry read, changed and written": _after_gradient("fused_loss", _written_twice),
    "logp rounded to bf16": _statistics(_rounded),
    "slope of exp dropped": _rule(Op.EXP, lambda y, x, dx: dx[0]),
    "half of the product rule dropped": _rule(Op.MUL, lambda y, x, dx: dx[0] * x[1]),
    "slope of a quotient's denominator dropped": _rule(Op.DIV, lambda y, x, dx: dx[0] / x[1]),
    "clamp lets every gradient through": _rule(Op.CLAMP, lambda y, x, dx: dx[0]),
    "empty sequences counted when they are to be skipped": _weights,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "_"))
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    cases = (case for case in (make(2, k) for k in range(CASES)) if case.backend == "cpu" and not case.linear)
    found = (problem for case in cases for problem in run(case).problems)
    assert any(not problem.startswith("raised") for problem in found), "every case passes"
