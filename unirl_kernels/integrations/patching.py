"""Replaces objects of another library in its loaded modules, and restores them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType, TracebackType
from typing import Any


@dataclass(frozen=True, eq=False)
class Replacement:
    """A replacement of an object in modules, and in the dictionaries that they hold.

    Args:
        old: the library's object.
        new: the object that replaces it.
        where: one or several names of modules, or of packages that contain them. ``*`` matches anything.
    """

    old: object
    new: object
    where: str | tuple[str, ...]

    @property
    def undone(self) -> Replacement:
        return Replacement(self.new, self.old, self.where)


class Patch:
    """Replacements in all modules that hold the objects, until ``undo`` or the end of a ``with`` block.

    Args:
        replacements: the replacements.

    Raises:
        RuntimeError: when no imported module holds one of the objects. Nothing is replaced then.

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
        """Restore every original, also in modules that were imported meanwhile. A second call does nothing."""
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
    """The active patch of a library, at most one."""

    def __init__(self) -> None:
        self._patch: Patch | None = None

    def on(self, replacements: Sequence[Replacement]) -> Patch:
        """Undo the active patch, and start a new one.

        Raises:
            RuntimeError: as ``Patch``.
        """
        self.off()
        self._patch = Patch(replacements)
        return self._patch

    def off(self) -> None:
        """Undo the active patch. Without one it does nothing."""
        if self._patch is not None:
            self._patch.undo()
            self._patch = None


def _swap(replacement: Replacement) -> None:
    for holder, name in list(_holders(replacement)):
        holder[name] = replacement.new


def _holders(replacement: Replacement) -> Iterator[tuple[dict[Any, Any], Any]]:
    """The dictionaries that hold the old object, with the key."""
    for module in _loaded(replacement.where):
        for names in (vars(module), *(x for x in vars(module).values() if type(x) is dict)):
            for name, value in list(names.items()):
                if value is replacement.old:
                    yield names, name


def _loaded(where: str | tuple[str, ...]) -> Iterator[ModuleType]:
    packages = (where,) if isinstance(where, str) else where
    for name, module in list(sys.modules.items()):
        inside = any(fnmatchcase(name, package) or fnmatchcase(name, f"{package}.*") for package in packages)
        if inside and isinstance(module, ModuleType):
            yield module


def known(module: ModuleType, name: str, *signatures: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """Look up a function, an autograd function or a module of another library, and check its signature.

    Args:
        module: the module to search.
        name: its name.
        signatures: the names of its parameters in order, for each supported version.

    Returns:
        The function and its signature.

    Raises:
        RuntimeError: when it does not exist or has another signature; the message has the expected and the found one.
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
    """Names of the parameters of a function, or of the forward of an autograd function or a module, in order."""
    function = getattr(found, "forward", found)
    return [name for name in inspect.signature(function).parameters if name not in ("ctx", "self")]
