"""Puts objects in the place of another library's, and back. Works for modules of any name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any


@dataclass(frozen=True, eq=False)
class Replacement:
    """An object that takes another's place, in modules and in the dictionaries that they hold.

    Args:
        old: the library's object.
        new: what takes its place.
        where: the modules in which it does, by their name or that of a package around them; several names, or one.
    """

    old: object
    new: object
    where: str | tuple[str, ...]

    @property
    def undone(self) -> Replacement:
        return Replacement(self.new, self.old, self.where)


class Patch:
    """Replacements in whatever module holds the objects, until ``undo`` or the end of a ``with`` block.

    Args:
        replacements: what takes whose place.

    Raises:
        RuntimeError: when no module that is imported holds an object. Nothing is replaced then.

    Examples:
        >>> import types, sys
        >>> from unirl_kernels.integrations.patching import Patch, Replacement
        >>> sys.modules["my_trainer"] = module = types.ModuleType("my_trainer")
        >>> module.score = len
        >>> with Patch([Replacement(module.score, sum, "my_trainer")]):
        ...     module.score
        <built-in function sum>
        >>> module.score
        <built-in function len>
    """

    def __init__(self, replacements: Sequence[Replacement]) -> None:
        self._replacements = list(replacements)
        for replacement in self._replacements:
            if not any(_holders(replacement)):
                raise RuntimeError(f"no module of {replacement.where!r} holds {replacement.old!r}: import it first")
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


class Switch:
    """The patch of one library: there is one at a time, or none."""

    def __init__(self) -> None:
        self._patch: Patch | None = None

    def on(self, replacements: Sequence[Replacement]) -> Patch:
        """End the patch before, and begin another.

        Raises:
            RuntimeError: as ``Patch``.
        """
        self.off()
        self._patch = Patch(replacements)
        return self._patch

    def off(self) -> None:
        """End the patch. Without one it does nothing."""
        if self._patch is not None:
            self._patch.undo()
            self._patch = None


def _swap(replacement: Replacement) -> None:
    for holder, name in list(_holders(replacement)):
        holder[name] = replacement.new


def _holders(replacement: Replacement) -> Iterator[tuple[dict[Any, Any], Any]]:
    """What holds the old object, and by which name."""
    for module in _loaded(replacement.where):
        for names in (vars(module), *(x for x in vars(module).values() if type(x) is dict)):
            for name, value in list(names.items()):
                if value is replacement.old:
                    yield names, name


def _loaded(where: str | tuple[str, ...]) -> Iterator[ModuleType]:
    packages = (where,) if isinstance(where, str) else where
    for name, module in list(sys.modules.items()):
        inside = any(name == package or name.startswith(f"{package}.") for package in packages)
        if inside and isinstance(module, ModuleType):
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
