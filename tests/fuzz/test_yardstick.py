"""How large an error may be: what the budgets are made of."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
import torch

from tests.fuzz.answers import SHORT_EXPONENTIALS
from tests.fuzz.roundings import OtherRoundings

RUNS = 25
CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.parametrize(("dtype", "degree"), [("bfloat16", 3), ("float16", 4)])
def test_errors_of_the_short_exponentials(dtype: str, degree: int) -> None:
    """Those of the polynomials in the kernels' source, which takes them for that dtype."""
    source = (CSRC / "exponential.h").read_text()
    found = re.search(rf"EXP2<{degree}>\[\] = {{([^}}]*)}}", source)
    assert found is not None
    coefficients = [float(x.strip().rstrip("f")) for x in re.sub(r"//.*", "", found[1]).split(",")]
    assert len(coefficients) == degree + 1
    f = numpy.linspace(-0.5, 0.5, 20001)
    error = numpy.abs(numpy.polynomial.polynomial.polyval(f, coefficients) / numpy.exp2(f) - 1).max()
    assert 0.9 * SHORT_EXPONENTIALS[dtype] < error <= SHORT_EXPONENTIALS[dtype]
    assert SHORT_EXPONENTIALS[dtype] < torch.finfo(getattr(torch, dtype)).eps / 2 / 20, "it does not show"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_not_exact_is_rounded_in_other_ways(dtype: torch.dtype) -> None:
    x = torch.rand(1, 200, dtype=dtype).expand(RUNS, -1) + 0.5
    with OtherRoundings(RUNS):
        products, sums = x * x, x.sum(-1)
    for moved, plain in ((products, x * x), (sums, x.sum(-1))):
        off = (moved - plain).abs() / plain
        assert 0 < off.max() <= 1.5 * torch.finfo(dtype).eps
        assert not torch.equal(moved[0], moved[1])
        assert (moved < plain).any()
        assert (moved > plain).any()


def test_what_is_exact_stays() -> None:
    x = (torch.rand(RUNS, 200) + 0.5).requires_grad_()
    with OtherRoundings(RUNS):
        ratio = torch.exp(x - x.detach())
        kept = (2 * x, x - x, x.abs(), x.clamp(max=0.7), torch.where(x > 1, x, 0.0), ratio)
        (d_x,) = torch.autograd.grad(ratio.sum(), x)
    expected = (2 * x, x - x, x, x.clamp(max=0.7), torch.where(x > 1, x, 0.0), torch.ones_like(x))
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
    assert torch.equal(d_x, torch.ones_like(x))


def test_equal_results_stay_equal() -> None:
    """A tie is no matter of rounding."""
    x = torch.rand(RUNS, 200) + 0.5
    with OtherRoundings(RUNS):
        a, b = x * x * 3, x * x * 3
    assert torch.equal(a, b)


def test_a_sign_that_rounding_decides_is_any() -> None:
    d = torch.full((RUNS, 200), 1e-6) * torch.linspace(0.1, 1, 200)
    with OtherRoundings(RUNS):
        found = torch.sign(torch.exp(d) - d - 1)
    assert (found.amin(0) < 0).all()
    assert (found.amax(0) > 0).all()


def test_gradients_are_rounded_in_other_ways_too() -> None:
    x = (torch.rand(1, 200) + 0.5).expand(RUNS, -1).clone().requires_grad_()
    with OtherRoundings(RUNS):
        (d_x,) = torch.autograd.grad((torch.exp(x) * x).sum(), x)
    assert not torch.equal(d_x[0], d_x[1])
    exact = torch.exp(x.double()) * (1 + x.double())
    torch.testing.assert_close(d_x.double(), exact, rtol=8 * torch.finfo(torch.float32).eps, atol=0)
