"""Collectives of torch.distributed as functional operators: CommDebugMode counts them, torch.compile traces them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Group(NamedTuple):
    """A process group as operators take it."""

    name: str
    size: int
    rank: int  # of this process in the group


def group_of(argument: str, group: ProcessGroup) -> Group:
    """The group of an argument.

    Raises:
        TypeError: when it is not a process group.
        ValueError: when this process is not in it.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        hint = ""
        if type(group).__name__ == "DeviceMesh":
            hint = "; give mesh.get_group()"
        raise TypeError(f"{argument} must be a torch.distributed process group, got {type(group).__name__}{hint}")
    rank = distributed.get_rank(group)
    if rank < 0:
        raise ValueError(f"{argument} must hold this process, got a group of others")
    return Group(group.group_name, group.size(), rank)


def _operators() -> Any:
    # What gives the operators shapes without data; a process that splits nothing does not load it.
    import torch.distributed._functional_collectives

    return torch.ops._c10d_functional


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[n, *x.shape]: the x of each rank, in the order of ranks. The shape is the same on all."""
    operators = _operators()
    found = operators.all_gather_into_tensor(x.reshape(-1), group.size, group.name)
    return operators.wait_tensor(found).view(group.size, *x.shape)  # type: ignore[no-any-return]


def all_texts(own: str, group: Group, device: torch.device) -> list[str]:
    """The text of each rank; waits for the device."""
    encoded = own.encode()
    longest = int(all_gather(torch.tensor(len(encoded), device=device), group).max())
    padded = torch.tensor(list(encoded.ljust(longest)), dtype=torch.uint8, device=device)
    return [bytes(text.tolist()).decode().rstrip(" ") for text in all_gather(padded, group)]


def start_all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x, which is there after ``wait``."""
    return _operators().all_reduce(x.contiguous(), "sum", group.name)  # type: ignore[no-any-return]


def wait(x: Tensor) -> Tensor:
    return _operators().wait_tensor(x)  # type: ignore[no-any-return]


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x."""
    return wait(start_all_reduce(x, group))


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """[m / n, ...] of [m, ...]: this rank's part of the sum of the ranks' x."""
    operators = _operators()
    found = operators.reduce_scatter_tensor(x.contiguous(), "sum", group.size, group.name)
    return operators.wait_tensor(found)  # type: ignore[no-any-return]


class SumOverGroup(torch.autograd.Function):
    """The sum of the ranks' x, added in their order.

    The loss is the sum of the ranks' losses, each of which depends on this sum: so the gradient is a sum, too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(x, group).sum(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradients[0], ctx.group).sum(0), None


class SumGradient(torch.autograd.Function):
    """x in another dtype, whose gradient is summed over the ranks in that dtype: each of them has a part of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.dtype = group, x.dtype
        return x.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(gradients[0], ctx.group).to(ctx.dtype), None, None


class Gathered(torch.autograd.Function):
    """[n m, ...] of the ranks' x, [m, ...], in another dtype; in that the gradient of x is summed over the ranks, and
    multiplied by a factor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dtype: torch.dtype, factor: int) -> Tensor:
        ctx.group, ctx.dtype, ctx.factor = group, x.dtype, factor
        return all_gather(x.contiguous(), group).flatten(0, 1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        found = reduce_scatter(gradients[0], ctx.group)
        return (found if ctx.factor == 1 else found * ctx.factor).to(ctx.dtype), None, None, None
