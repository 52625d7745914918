"""Scalars that remember how they were computed: what an objective is run on while it is traced."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar, NoReturn

import torch

from unirl_kernels.program.graph import Graph


class UnsupportedOperation(TypeError):
    """An objective uses an operation that the one-pass kernels cannot run.

    The text names the operation, lists those that can be used, and says how to run the objective all the same.

    Examples:
        >>> loss = uk.Loss(lambda t: torch.special.i0(t.logp))
        >>> try:
        ...     loss.traced()
        ... except uk.UnsupportedOperation as error:
        ...     print("special_i0" in str(error), "Plan(kernel='composed')" in str(error))
        True True
    """


class Symbol:
    """A scalar of one token. Behaves like a tensor for the supported operations.

    Args:
        graph, node: the expression.
        truth: whether a tensor in its place would be of dtype bool, whose arithmetic differs from that of numbers.
            None for a user's field, which may be either.
    """

    dtype = torch.float32
    device = torch.device("cpu")
    # What functions record stands in ``functions``, which needs symbols itself and sets these two.
    functions: ClassVar[Collection[str]] = ()
    record: ClassVar[Callable[..., Symbol]]

    def __init__(self, graph: Graph, node: int, truth: bool | None = False) -> None:
        self.graph = graph
        self.node = node
        self.truth = truth

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Symbol:
        name = getattr(func, "__name__", str(func))
        return _call(name, args, kwargs or {}, method=func is getattr(torch.Tensor, name, None))

    def __getattr__(self, name: str) -> Callable[..., Symbol]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self.functions:
            raise UnsupportedOperation(f"uses .{name}; one-pass kernels run {', '.join(sorted(self.functions))}")
        return lambda *args, **kwargs: _call(name, (self, *args), kwargs, method=True)

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

    # Each stands here by itself, so that tools and readers see which operators there are.
    def __add__(self, y: Any) -> Symbol:
        return _call("add", (self, y))

    def __sub__(self, y: Any) -> Symbol:
        return _call("sub", (self, y))

    def __rsub__(self, y: Any) -> Symbol:
        return _call("rsub", (self, y))

    def __mul__(self, y: Any) -> Symbol:
        return _call("mul", (self, y))

    def __truediv__(self, y: Any) -> Symbol:
        return _call("div", (self, y))

    def __rtruediv__(self, y: Any) -> Symbol:
        return _call("rdiv", (self, y))

    def __pow__(self, y: Any) -> Symbol:
        return _call("pow", (self, y))

    def __neg__(self) -> Symbol:
        return _call("neg", (self,))

    def __abs__(self) -> Symbol:
        return _call("abs", (self,))

    def __lt__(self, y: Any) -> Symbol:
        return _call("lt", (self, y))

    def __le__(self, y: Any) -> Symbol:
        return _call("le", (self, y))

    def __gt__(self, y: Any) -> Symbol:
        return _call("gt", (self, y))

    def __ge__(self, y: Any) -> Symbol:
        return _call("ge", (self, y))

    def __eq__(self, y: Any) -> Symbol:  # type: ignore[override]
        return _call("eq", (self, y))

    def __ne__(self, y: Any) -> Symbol:  # type: ignore[override]
        return _call("ne", (self, y))

    def __and__(self, y: Any) -> Symbol:
        return _call("bitwise_and", (self, y))

    def __or__(self, y: Any) -> Symbol:
        return _call("bitwise_or", (self, y))

    def __invert__(self) -> Symbol:
        return _call("bitwise_not", (self,))

    __radd__ = __add__
    __rmul__ = __mul__
    __rand__ = __and__
    __ror__ = __or__


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, method: bool = False) -> Symbol:
    return Symbol.record(name, args, kwargs or {}, method=method)
