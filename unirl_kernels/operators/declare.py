"""Declares operators of ``torch.ops.unirl`` from typed functions whose arguments are named groups.

A group is a ``NamedTuple`` of tensors and scalars. torch.library sees its fields as separate arguments
``<argument>_<field>``. The annotations determine the schema, the flattening and the regrouping.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import UnionType
from typing import Any

import torch
from torch import Tensor

PACKAGE = __name__.split(".")[0]
NAMESPACE = "unirl" if PACKAGE == "unirl_kernels" else PACKAGE
"""``kernels`` may load several versions under different names: each needs its own namespace of operators."""
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}


def _is_group(annotation: Any) -> bool:
    return hasattr(annotation, "_fields")


def _schema_type(annotation: Any) -> str:
    if isinstance(annotation, UnionType):
        (inner,) = (x for x in typing.get_args(annotation) if x is not type(None))
        return f"{SCHEMA_TYPES[inner]}?"
    return SCHEMA_TYPES[annotation]


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types of the values in a result, which is a tensor, or a group of tensors or groups."""
    if not _is_group(annotation):
        yield annotation
        return
    for inner in typing.get_type_hints(annotation).values():
        yield from _leaves(inner)


def flat(groups: Iterable[object]) -> list[Any]:
    """Flatten values and groups of values to one list."""
    values: list[Any] = []
    for group in groups:
        if isinstance(group, tuple):
            values.extend(group)
        else:
            values.append(group)
    return values


Builder = Callable[[Sequence[Any]], Any]


def _builder(annotation: Any, start: int) -> Builder:
    """A function that takes the flat values, and groups those of an annotation, which begin at ``start``."""
    if not _is_group(annotation):
        return lambda values: values[start]
    fields = typing.get_type_hints(annotation).values()
    if any(map(_is_group, fields)):
        builders = _builders(fields, start)
        return lambda values: annotation._make([build(values) for build in builders])
    stop = start + len(fields)
    return lambda values: annotation._make(values[start:stop])


def _builders(annotations: Iterable[Any], start: int = 0) -> list[Builder]:
    builders = []
    for annotation in annotations:
        builders.append(_builder(annotation, start))
        start += len(list(_leaves(annotation)))
    return builders


class Operator:
    """An operator of torch.library that takes and returns named groups.

    The implementation gets the groups, on any device; the backend is one of the arguments. The operator has no
    gradient: autograd functions (``operators/autograd.py``) call it.

    Args:
        name: of the operator.
        signature: a function whose annotations declare it: tensors, scalars and groups of them.
        fake: what it returns for tensors without data.
        mutates: names of the tensors that it overwrites.
    """

    def __init__(
        self, name: str, signature: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()
    ) -> None:
        hints = typing.get_type_hints(signature)
        self.name = name
        self._returns = hints.pop("return")
        self._arguments = list(hints.items())
        self._build_arguments = _builders(hints.values())
        self._build_result = _builder(self._returns, 0) if _is_group(self._returns) else None
        LIBRARY.define(self._schema(mutates))
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self._regrouped(fake), lib=LIBRARY)
        if not mutates:
            # Python code at the autograd key would cost 20 us a call; the implementation refuses gradients itself.
            LIBRARY.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
        self._call = getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def _schema(self, mutates: tuple[str, ...]) -> str:
        parameters = []
        for name, annotation in self._arguments:
            if _is_group(annotation):
                for field, inner in typing.get_type_hints(annotation).items():
                    parameters.append(f"{_schema_type(inner)} {name}_{field}")
            else:
                alias = "(a!)" if name in mutates else ""
                parameters.append(f"{_schema_type(annotation)}{alias} {name}")
        results = [] if self._returns is type(None) else [_schema_type(x) for x in _leaves(self._returns)]
        returned = results[0] if len(results) == 1 else f"({', '.join(results)})"
        return f"{self.name}({', '.join(parameters)}) -> {returned}"

    def _regrouped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as torch.library calls it."""

        def run(*given: object) -> Any:
            result = function(*[build(given) for build in self._build_arguments])
            return result if self._build_result is None else tuple(flat(result))

        return run

    def implementation(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the function that runs, on every device."""
        implemented = self._regrouped(function)

        def run(*given: object) -> Any:
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given):
                raise RuntimeError(
                    f"torch.ops.{NAMESPACE}.{self.name} has no gradient of its own: call the functions of "
                    "unirl_kernels, which have"
                )
            return implemented(*given)

        LIBRARY.impl(self.name, run, "CompositeExplicitAutograd")
        return function

    def __call__(self, *groups: object) -> Any:
        result = self._call(*flat(groups))
        return result if self._build_result is None else self._build_result(result)


def operator(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: declare an operator by the function that implements it."""

    def declare(function: Callable[..., Any]) -> Operator:
        declared = Operator(function.__name__, function, fake, mutates)
        declared.implementation(function)
        return declared

    return declare
