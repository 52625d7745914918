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


def check_count(name: str, value: object) -> None:
    """Check a global count of tokens, sequences or pairs: None, a number > 0, or a 0-dim tensor.

    A tensor's value is not read, which would wait for the device: a count of 0 gives weights of 0 or inf.

    Raises:
        TypeError: when ``value`` is not a number.
        ValueError: when it is not positive, or a tensor with dimensions or with a gradient.
    """
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"{name} must be a 0-dim tensor, got shape {tuple(value.shape)}")
        if value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: weights are constants of the loss; detach it")
    elif value is not None:
        check_number(name, value)
        if not value > 0:  # type: ignore[operator]
            raise ValueError(f"{name} must be positive, got {value}")
