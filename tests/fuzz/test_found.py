"""Cases that the search once found wrong, each with a different cause."""

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
    "gradients of a sequence's tokens, added in another order where they are packed": (103, 396),
    "the same in fp64": (405, 69864),
    "softplus beyond its threshold": (102, 10102),
    "a gradient in bf16 by a short exponential": (401, 685),
    "a gradient that the interpreter cuts off twice": (402, 31683),
    "a head's gradient that the interpreter cuts off": (404, 374),
    "whether a difference is 0, which rounding decides": (401, 13432),
    "the sign of what is 0 but for rounding": (402, 20697),
    "a gradient beyond fp16 before a smaller upstream gradient": (401, 35966),
    "a coefficient of the entropy beyond fp32 when kappa multiplies it twice": (402, 35337),
    "a sum that cancels, which eager gets right by luck": (401, 22148),
    "a term beside an infinite one": (401, 19933),
}


@pytest.mark.parametrize("name", FOUND)
def test_is_right_now(name: str) -> None:
    assert not run(make(*FOUND[name])).problems
