"""Puts objects in the place of another library's, and back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any


@dataclass(frozen=True, eq=False)
class Replacement:
    """An object that takes another's place.

    Args:
        old: the library's object.
        new: what takes its place.
        where: the modules in which it does, by their name or that of a package around them.
    """

    old: object
    new: object
    where: str

    @property
    def undone(self) -> Replacement:
        return Replacement(self.new, self.old, self.where)


class Patch:
    """Replacements in whatever module holds the objects, until ``undo`` or the end of a ``with`` block.

    Args:
        replacements: what takes whose place.
    """

    def __init__(self, replacements: Sequence[Replacement]) -> None:
        self._replacements = list(replacements)
        for replacement in self._replacements:
            _swap(replacement)

    def undo(self) -> None:
        """Put every original back, in modules that were imported meanwhile, too. A second time does nothing."""
        for replacement in self._replacements:
            _swap(replacement.undone)
        self._replacements.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _swap(replacement: Replacement) -> None:
    for module in _loaded(replacement.where):
        for name, value in list(vars(module).items()):
            if value is replacement.old:
                setattr(module, name, replacement.new)


def _loaded(where: str) -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if (name == where or name.startswith(f"{where}.")) and isinstance(module, ModuleType):
            yield module


def known(module: ModuleType, name: str, *signatures: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """A function, an autograd function or a module of another library that takes what is expected of it.

    Args:
        module: where it is looked for.
        name: its name.
        signatures: names of its parameters in order, one for each version known.

    Returns:
        The function and its signature.

    Raises:
        RuntimeError: when it is not there or takes something else, saying what was looked for and what was found.
    """
    wanted = " or ".join(f"{name}({', '.join(signature)})" for signature in signatures)
    found = getattr(module, name, None)
    if found is None:
        raise RuntimeError(f"looked for {wanted} in {module.__name__}, found nothing of that name")
    taken = parameters_of(found)
    if taken not in map(list, signatures):
        raise RuntimeError(f"looked for {wanted} in {module.__name__}, found {name}({', '.join(taken)})")
    return found, taken


def parameters_of(found: Any) -> list[str]:
    """Names of what a function, or the forward of an autograd function or a module, is called with, in order."""
    function = getattr(found, "forward", found)
    return [name for name in inspect.signature(function).parameters if name not in ("ctx", "self")]
