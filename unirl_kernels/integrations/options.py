"""What a trainer's configuration says. Whatever is refused is refused by the name of its option."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from unirl_kernels.objectives.arguments import Number

T = TypeVar("T")


class Options:
    """Reads a configuration's options, by attribute or, of a mapping, by key.

    Args:
        config: the configuration.
        title: how errors call it, such as ``GRPOConfig``.
    """

    def __init__(self, config: Any, title: str) -> None:
        self.config, self.title = config, title
        self.read: dict[str, Any] = {}
        """The options that were read, with their values then."""

    def get(self, name: str) -> Any:
        """The value of an option.

        Raises:
            TypeError: when the configuration has no such option.
        """
        # An OmegaConf mapping returns None for an attribute that it lacks.
        found = name in self.config if isinstance(self.config, Mapping) else hasattr(self.config, name)
        if not found:
            raise TypeError(f"{self.title} must have the option {name}, got {type(self.config).__name__} without it")
        value = self.config[name] if isinstance(self.config, Mapping) else getattr(self.config, name)
        self.read[name] = copy.copy(value)  # a list may be changed later
        return value

    def part(self, name: str) -> Options:
        """The options of a configuration within the configuration."""
        return Options(self.get(name), f"{self.title}.{name}")

    def number(self, name: str, kind: Any = Number) -> float:
        """A number of a range.

        Args:
            name: of the option.
            kind: the range, a type of ``objectives.arguments``.

        Raises:
            TypeError: when it is not a number.
            ValueError: when it is outside the range.
        """
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{self.title}.{name} must be a number, got {value!r}")
        _, allowed = get_args(kind)
        if not allowed.holds(value):
            raise ValueError(f"{self.title}.{name} must {allowed.words}, got {value!r}")
        return float(value)

    def optional(self, name: str, kind: Any = Number) -> float | None:
        """A number of a range, or None."""
        return None if self.get(name) is None else self.number(name, kind)

    def flag(self, name: str) -> bool:
        """True or False.

        Raises:
            TypeError: when it is anything else.
        """
        value = self.get(name)
        if not isinstance(value, bool):
            raise TypeError(f"{self.title}.{name} must be True or False, got {value!r}")
        return value

    def choice(self, name: str, known: Mapping[Any, T]) -> T:
        """What a table has for the option's value.

        Raises:
            ValueError: when the table has nothing for it.
        """
        value = self.get(name)
        # A list, say, has no hash.
        if not isinstance(value, str | None) or value not in known:
            raise ValueError(f"{self.title}.{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        return known[value]

    def refused(self, name: str, reason: str) -> ValueError:
        """An error: one loss cannot express what the option asks for.

        Args:
            name: of the option.
            reason: why, and what to do.
        """
        return ValueError(f"{self.title}.{name}={self.get(name)!r} cannot be part of the loss: {reason}")
