"""Checks of what objectives and aggregations are made of."""

from __future__ import annotations

import numbers

from torch import Tensor


def check_number(name: str, value: object) -> None:
    """
    Raises:
        TypeError: when ``value`` is neither a number nor a 0-dim tensor.
    """
    if isinstance(value, Tensor):
        if value.dim():
            raise TypeError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)}")
    elif not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
