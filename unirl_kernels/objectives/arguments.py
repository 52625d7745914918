"""Checks of the parameters of objectives and aggregations."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor


class Range(NamedTuple):
    """The allowed values of a parameter."""

    words: str  # "name must <words>"
    holds: Callable[[Any], bool]
    kind: str = "a number"


Number = Annotated[float, Range("be finite", math.isfinite)]
Positive = Annotated[float, Range("be positive", lambda x: x > 0)]
NonNegative = Annotated[float, Range("be at least 0", lambda x: x >= 0)]
Share = Annotated[float, Range("lie in [0, 1]", lambda x: 0 <= x <= 1)]
AboveOne = Annotated[float, Range("be above 1", lambda x: x > 1)]
Below1Half = Annotated[float, Range("lie in [0, 0.5)", lambda x: 0 <= x < 0.5)]
Exponent = Annotated[float, Range("be at least 1", lambda x: x >= 1)]
Bound = Annotated[float, Range("lie in (0, 80]", lambda x: 0 < x <= 80)]
"""A bound of a log-ratio: exp(80) is finite in fp32."""
Field = Annotated[str, Range("be an identifier", str.isidentifier, "the name of a field")]


CALLABLE = Range("be callable", callable, "callable, as Clip() is")


def _is_of_functions(hint: object) -> bool:
    return get_origin(hint) is Callable or (isinstance(hint, type) and issubclass(hint, Parameters))


class Parameters:
    """Base of frozen dataclasses whose parameters are checked when one is made.

    A parameter with one of the types above has a range. A parameter that is an objective or a rule must be callable.

    Raises:
        TypeError: when a parameter is not of its kind.
        ValueError: when a parameter is outside its range.
    """

    _ranges: ClassVar[tuple[tuple[str, Range, bool], ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found = []
        try:
            hints = get_type_hints(cls, include_extras=True)
        except NameError:  # a class of a function's own, annotated with names that only the function knows
            return
        for name, hint in hints.items():
            options = (hint, *get_args(hint))
            for option in options:
                ranges = getattr(option, "__metadata__", (CALLABLE,) if _is_of_functions(option) else ())
                found += [(name, x, type(None) in options) for x in ranges]
        cls._ranges = tuple(found)

    def __post_init__(self) -> None:
        for name, allowed, optional in self._ranges:
            value = getattr(self, name)
            if not (optional and value is None):
                _check(name, value, allowed)


def _check(name: str, value: object, allowed: Range) -> None:
    if allowed.kind == "a number":
        check_number(name, value)
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return  # reading it would wait for the device
    elif not isinstance(value, str) if allowed is not CALLABLE else isinstance(value, type) or not callable(value):
        raise TypeError(f"{name} must be {allowed.kind}, got {value!r} ({type(value).__name__})")
    if not allowed.holds(value):
        raise ValueError(f"{name} must {allowed.words}, got {value!r}")


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
