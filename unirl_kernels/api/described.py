"""Arguments as text, to compare those of two ranks.

Equal arguments have equal texts. Different numbers have different texts if they stand in public attributes, items,
closures, defaults, parameters or buffers. Of private attributes only floats and tensors are compared, and of what a
function reads from its module only numbers: ranks may differ in the rest.
"""

from __future__ import annotations

import dataclasses
import dis
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Set
from enum import Enum
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.batch import Batch
from unirl_kernels.checks import name_of
from unirl_kernels.objectives import Loss
from unirl_kernels.operators.shards import target_hash

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DEPTH = 8
"""Nesting depth to which attributes are compared."""


def hash_of(lines: Iterable[str]) -> int:
    """A number of 64 bits."""
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def compared_lines(value: object, values: bool) -> list[str]:
    """The text that is compared.

    For a loss of token scope it is the program and its parameters, so two functions that compute the same are equal.

    Args:
        value: an argument.
        values: whether to compare numbers and values of tensors, not only types, shapes and dtypes.
    """
    if isinstance(value, Loss) and (program := _program(value, values)) is not None:
        weights = [(term.aggregation, term.coefficient) for term in value.terms]
        return [*program, *shown_lines(weights, values)]
    return shown_lines(value, values)


def shown_lines(value: object, values: bool) -> list[str]:
    """A line ``path=value`` for each number, tensor and name in an argument."""
    if isinstance(value, Batch):  # targets have a separate hash
        names = [f.name for f in dataclasses.fields(value) if f.name != "target"]
        return list(_lines("", {name: getattr(value, name) for name in names}, values, DEPTH))
    if isinstance(value, Loss):
        own = _program(value, values) or []
        return [*_lines("", {"scope": value.scope, "terms": value.terms}, values, DEPTH), *own]
    return list(_lines("", value, values, DEPTH))


def _program(loss: Loss, values: bool) -> list[str] | None:
    """Program and parameters of a loss; None if it has no program."""
    if loss.scope != "token":
        return None
    try:
        traced = [loss.traced(), loss.traced(on_policy=True)]
    except TypeError:  # UnsupportedOperation: it has none
        return None
    params = [tuple(map(float, one.params)) if values else len(one.params) for one in traced]
    return [f"program={hash_of([one.text])}, parameters {own}" for one, own in zip(traced, params, strict=True)]


def _lines(path: str, value: Any, values: bool, depth: int) -> Iterator[str]:
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str | bool | torch.dtype | None):
        yield f"{path}={value!r}"
    elif isinstance(value, int | float | complex):
        yield f"{path}={value!r}" if values else f"{path}={type(value).__name__}"
    elif isinstance(value, Enum):
        yield f"{path}={type(value).__qualname__}.{value.name}"
    elif isinstance(value, Tensor):
        yield f"{path}={_tensor(value, values)}"
    elif isinstance(value, torch.distributed.ProcessGroup):
        yield f"{path}=group of {value.size()}"  # ranks have different objects
    elif isinstance(value, ModuleType):
        yield f"{path}={value.__name__}"
    else:
        yield f"{path}={getattr(value, '__qualname__', type(value).__qualname__)}"
        if depth:
            for name, part in _parts(value):
                yield from _lines(f"{path}{name}", part, values, depth - 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value, by name. Of private attributes, which begin with _, only floats and tensors."""
    if isinstance(value, Mapping):
        yield from ((f".{key}", value[key]) for key in sorted(value, key=str))
    elif isinstance(value, list | tuple):
        yield from ((f"[{k}]", part) for k, part in enumerate(value))
    elif isinstance(value, Set):
        yield from ((f"[{k}]", part) for k, part in enumerate(sorted(value, key=repr)))
    elif isinstance(value, partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield from ((".self", value.__self__), (".func", value.__func__))
    elif isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, torch.nn.Module):
        own = [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False), *value.named_children()]
        yield from ((f".{name}", part) for name, part in [*own, *_attributes(value)])
    elif dataclasses.is_dataclass(value):
        yield from ((f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value))
    elif not isinstance(value, type):
        yield from ((f".{name}", part) for name, part in _attributes(value))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(value, "__dict__", {})
    for name in sorted({*own, *_slots(type(value))}):
        part = own[name] if name in own else getattr(value, name, None)
        if not name.startswith("_") or (isinstance(part, float | complex | Tensor) and not name.startswith("__")):
            yield name, part


def _of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    yield "()", str(hash_of(_code(code)))
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        yield f".{name}", cell.cell_contents
    yield from ((f".default[{k}]", part) for k, part in enumerate(function.__defaults__ or ()))
    yield from ((f".default.{name}", part) for name, part in sorted((function.__kwdefaults__ or {}).items()))
    numbers = {name: function.__globals__.get(name) for name in sorted(set(_globals(code)))}
    yield from ((f".{name}", x) for name, x in numbers.items() if isinstance(x, int | float | complex))


def _globals(code: CodeType) -> Iterator[str]:
    """Names that a function, or one inside of it, reads from its module."""
    yield from (of.argval for of in dis.get_instructions(code) if of.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)


def _slots(kind: type) -> Iterator[str]:
    for cls in kind.__mro__:
        slots = vars(cls).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def _code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        elif isinstance(constant, frozenset):
            yield repr(sorted(constant, key=repr))
        else:
            yield repr(constant)


def _tensor(x: Tensor, values: bool) -> str:
    text = f"{name_of(x.dtype)} {tuple(x.shape)}"
    if x.requires_grad:
        text += ", requires_grad"
    if values and not x.dim():
        return f"{text}, {x.item()}"
    if values and x.dtype.itemsize in BITS:
        return f"{text}, hash {int(target_hash(x.detach().contiguous().view(BITS[x.dtype.itemsize]))):x}"
    return text
