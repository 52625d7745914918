"""Errors and budgets, by hand; and the example of ``unirl_kernels.testing`` runs."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from unirl_kernels import testing
from unirl_kernels.testing.budgets import Error, budget, condition_of, error, violations

EPS = torch.finfo(torch.float32).eps
TRUTH = torch.tensor([3.0, -4.0, 0.0, 5.0], dtype=torch.float64)


def test_errors_by_hand() -> None:
    """Too large by 0.5 at 3, too small in magnitude by 1 at -4: the truth's norm is sqrt(50), its mass 12."""
    found = error(torch.tensor([3.5, -3.0, 0.0, 5.0]), TRUTH)
    assert found.largest == 1.0
    assert found.relative == pytest.approx(math.sqrt(1.25 / 50))
    assert found.bias == pytest.approx((0.5 - 1.0) / 12)


def test_errors_of_what_is_equal_or_zero() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    assert error(TRUTH.float(), TRUTH) == error(zeros, zeros) == error(zeros[:0], zeros[:0]) == Error(0.0, 0.0, 0.0)
    assert error(zeros + 2, zeros) == Error(2.0, math.inf, math.inf)


def test_infinities_and_nan_must_be_in_the_same_places() -> None:
    infinite = torch.tensor([-math.inf, math.nan, 1.0], dtype=torch.float64)
    assert error(infinite.clone(), infinite) == Error(0.0, 0.0, 0.0)
    assert error(infinite + 0.5, infinite).largest == 0.5
    for i, value in ((0, math.inf), (0, -1e30), (1, 0.0), (2, math.nan)):
        other = infinite.clone()
        other[i] = value
        with pytest.raises(ValueError, match=rf"at \({i},\) like the truth"):
            error(other, infinite)
        assert violations(other, infinite, infinite)
    with pytest.raises(ValueError, match=r"x must have shape \(4,\), got \(3,\)"):
        error(infinite, TRUTH)


def test_condition_by_hand() -> None:
    assert condition_of(TRUTH, 50.0) == 10.0
    assert condition_of(TRUTH, 2.0) == condition_of(TRUTH) == 1.0
    assert condition_of(torch.tensor([-math.inf, 0.5], dtype=torch.float64), 2.0) == 4.0


def test_budget_by_hand() -> None:
    """Twice the error of the plain result, and 8 ulp of its dtype, in units of the largest value."""
    plain = TRUTH.float() + torch.tensor([0.0, 0.25, 0.0, 0.0])
    allowed = budget(plain, TRUTH, condition=3.0)
    assert allowed.largest == pytest.approx(2 * 0.25 + 24 * EPS * 5, rel=1e-12)
    assert allowed.relative == pytest.approx(2 * 0.25 / math.sqrt(50) + 24 * EPS, rel=1e-12)
    assert allowed.bias == pytest.approx(2 * 0.25 / 12 + 24 * EPS, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (torch.tensor([0.0, 0.49, 0.0, 0.0]), []),
        (torch.tensor([0.0, 0.51, 0.0, 0.0]), ["largest", "relative", "bias"]),
        (torch.tensor([-0.4, 0.4, 0.0, -0.4]), ["relative", "bias"]),
        (torch.tensor([0.4, 0.4, 0.0, 0.0]), ["relative"]),
    ],
)
def test_violations_name_what_is_too_large(change: torch.Tensor, broken: list[str]) -> None:
    """The plain result errs by 0.25 at one place; many small errors to one side do not hide under the largest."""
    plain = TRUTH.float() + torch.tensor([0.0, 0.25, 0.0, 0.0])
    found = violations(TRUTH.float() + change, plain, TRUTH)
    assert [text.split()[0] for text in found] == broken


def test_the_example_runs() -> None:
    failed, attempted = doctest.testmod(testing)
    assert attempted > 0
    assert failed == 0
