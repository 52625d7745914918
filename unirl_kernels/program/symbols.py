"""Symbols: scalars that record how they were computed. An objective runs on them while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from unirl_kernels.program.functions import FUNCTIONS, record
from unirl_kernels.program.operands import Operand, UnsupportedOperation, demand


def _operator(name: str) -> Callable[..., Symbol]:
    """The method of a Python operator; it records the function ``name``."""
    return lambda *args: Symbol.of_call(name, args, {})


class Symbol(Operand):
    """An operand that behaves like a tensor for the supported operations."""

    device = torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """float32 for any floating dtype: kernels compute in the dtype of their rows."""
        if self.truth:
            return torch.bool
        demand("float", "reads .dtype of", self)
        return torch.float32

    @classmethod
    def of_call(cls, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], method: bool = False) -> Symbol:
        """Record the torch function ``name``, or the tensor's method of that name."""
        found = record(name, args, kwargs, method=method)
        return cls(found.expr, found.truth, found.wide)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Symbol:
        name = getattr(func, "__name__", str(func))
        return cls.of_call(name, args, kwargs or {}, method=func is getattr(torch.Tensor, name, None))

    def __getattr__(self, name: str) -> Callable[..., Symbol]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in FUNCTIONS:
            raise UnsupportedOperation(f"uses .{name}; one-pass kernels run {', '.join(sorted(FUNCTIONS))}")
        return lambda *args, **kwargs: self.of_call(name, (self, *args), kwargs, method=True)

    def __bool__(self) -> NoReturn:
        raise UnsupportedOperation("branches on the value of a token: choose with torch.where")

    def __float__(self) -> NoReturn:
        raise UnsupportedOperation("turns a token's value into a Python number: use torch functions, not math")

    __int__ = __index__ = __float__

    def __iter__(self) -> NoReturn:
        raise UnsupportedOperation("iterates over tokens, which a one-pass kernel sees one at a time")

    def __getitem__(self, index: Any) -> NoReturn:
        raise UnsupportedOperation("indexes tokens, which a one-pass kernel sees one at a time")

    def __len__(self) -> NoReturn:
        raise UnsupportedOperation("asks for the number of tokens, of which a one-pass kernel sees one at a time")

    __hash__ = None  # type: ignore[assignment]

    __add__ = _operator("add")
    __sub__ = _operator("sub")
    __rsub__ = _operator("rsub")
    __mul__ = _operator("mul")
    __truediv__ = _operator("div")
    __rtruediv__ = _operator("rdiv")
    __pow__ = _operator("pow")
    __neg__ = _operator("neg")
    __abs__ = _operator("abs")
    __lt__ = _operator("lt")
    __le__ = _operator("le")
    __gt__ = _operator("gt")
    __ge__ = _operator("ge")
    __eq__ = _operator("eq")  # type: ignore[assignment]
    __ne__ = _operator("ne")  # type: ignore[assignment]
    __and__ = _operator("bitwise_and")
    __or__ = _operator("bitwise_or")
    __invert__ = _operator("bitwise_not")
    __radd__ = __add__
    __rmul__ = __mul__
    __rand__ = __and__
    __ror__ = __or__
