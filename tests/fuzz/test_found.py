"""Cases that the search once found wrong, each for another cause."""

from __future__ import annotations

import pytest

from tests.fuzz.case import make
from tests.fuzz.run import run

FOUND = {
    "a mean of large rewards, rounded as eager rounds it": (0, 379),
    "differences that cancel, in fp64": (5, 4383),
    "the smaller one of an infinity and NaN": (101, 6812),
    "a gradient beyond the largest number times an upstream gradient of 0": (102, 9136),
    "an objective that is 0 everywhere, which reads no field": (201, 168),
    "softplus beyond its threshold": (102, 10102),
}


@pytest.mark.parametrize("name", FOUND)
def test_is_right_now(name: str) -> None:
    assert not run(make(*FOUND[name])).problems
