"""Functions of the scalar program and of the readout, accurate to a few ulp in fp32 and fp64.

They use only exp2 and log, since Triton's interpreter has no libdevice. fp64 is for gradcheck; its speed does not
matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH = tl.constexpr(0.693145751953125)  # 22713 / 2^15: its product with an integer below 2^9 is exact in fp32
LN2_LOW = tl.constexpr(1.4286068203094172e-06)
EXP_RANGE = tl.constexpr(110.0)  # beyond this exp overflows or is 0 in fp32


@triton.jit
def minimum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    return minimum(maximum(x, low), high)


@triton.jit
def divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x / y, correctly rounded. The plain operator has errors of 2 ulp in fp32."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def sqrt(x: tl.tensor) -> tl.tensor:
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def sign(x: tl.tensor) -> tl.tensor:
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    """e^x, with an exact reduction of x. ``tl.exp`` rounds x log2(e) first, an error of |x| / 2 ulp in fp32."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = clamp(x, -EXP_RANGE, EXP_RANGE)
        n = tl.floor(x * LOG2E + 0.5)
        r = (x - n * LN2_HIGH) - n * LN2_LOW
        # Two factors, since 2^n = 2^128 would overflow although e^x does not.
        return tl.exp2(r * LOG2E) * 2.0 * tl.exp2(n - 1.0)


@triton.jit
def log(x: tl.tensor) -> tl.tensor:
    return tl.log(x)


@triton.jit
def log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x). The factor x / (u - 1) corrects the rounding of u = 1 + x (Kahan)."""
    u = 1.0 + x
    corrected = tl.log(u) * divide(x, tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u < float("inf"), corrected, u))


@triton.jit
def expm1(x: tl.tensor) -> tl.tensor:
    """e^x - 1. Near 0 a Taylor polynomial; in fp64 the factor x / log(u) corrects the rounding of u = e^x (Kahan)."""
    u = exp(x)
    if x.dtype == tl.float64:
        near = (tl.abs(x) < 1.0) & (u != 1.0)
        small = tl.where(near, (u - 1.0) * (x / tl.where(near, tl.log(u), 1.0)), x)
        return tl.where(near | (u == 1.0), small, u - 1.0)
    else:
        # The first omitted term is x^8 / 9!, relative: at most 2.6e-9 for |x| < 0.4. Beyond 0.4, u - 1 keeps 22 bits.
        p = x * (1.0 / 40320.0) + 1.0 / 5040.0
        p = p * x + 1.0 / 720.0
        p = p * x + 1.0 / 120.0
        p = p * x + 1.0 / 24.0
        p = p * x + 1.0 / 6.0
        p = p * x + 0.5
        return tl.where(tl.abs(x) < 0.4, x + x * (x * p), u - 1.0)


@triton.jit
def power(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x^y with the special values of C's pow. In fp64, since the relative error of the result is the error of y log
    x."""
    size = tl.abs(x).to(tl.float64)
    exponent = y.to(tl.float64)
    value = tl.exp(exponent * tl.log(size)).to(x.dtype)
    value = tl.where((y == 0) | (x == 1) | ((size == 1) & (exponent == exponent)), 1.0, value)
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    negative = (x < 0) | (divide(1.0, x) < 0)  # including -0
    value = tl.where(odd & negative, value * -1.0, value)  # Triton's negation is 0 - x, which gives 0 for 0
    # A negative number has only integer powers, except -inf, which has all.
    return tl.where((x < 0) & (x > float("-inf")) & (whole == 0), float("nan"), value)


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    return divide(1.0, 1.0 + exp(-x))


@triton.jit
def logsigmoid(x: tl.tensor) -> tl.tensor:
    return minimum(x, 0.0) - log1p(exp(-tl.abs(x)))


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Hyperbolic tangent. In fp32 it is cheap enough for every logit: one exp2, one division, a polynomial near 0."""
    a = tl.abs(x)
    if x.dtype == tl.float64:
        e = expm1(-2.0 * a)
        size = -e / (2.0 + e)
    else:
        # Minimax polynomial on [0, 0.625], relative error 4.4e-9. Beyond 0.625, 1 - 2 / (1 + e^2a) does not cancel.
        y = a * a
        p = -0.005704986862838268 * y + 0.0206390880048275
        p = p * y - 0.05373971536755562
        p = p * y + 0.13331441581249237
        p = p * y - 0.3333328068256378
        size = tl.where(a < 0.625, a + a * (y * p), 1.0 - 2.0 / (1.0 + tl.exp2(a * (2.0 * LOG2E))))
    return tl.where(x < 0, -size, size)
