"""Collectives of torch.distributed as functional operators: CommDebugMode counts them, torch.compile traces them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Group(NamedTuple):
    """A process group in the form that operators take."""

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
    # This import registers the operators' fakes. It is here so that a process without collectives does not load it.
    import torch.distributed._functional_collectives

    return torch.ops._c10d_functional


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[n, *x.shape]: the x of each rank, in the order of ranks. All ranks have the same shape."""
    operators = _operators()
    found = operators.all_gather_into_tensor(x.reshape(-1), group.size, group.name)
    return operators.wait_tensor(found).view(group.size, *x.shape)  # type: ignore[no-any-return]


def all_texts(own: str, group: Group, device: torch.device) -> list[str]:
    """The text of each rank. Waits for the device."""
    encoded = own.encode()
    longest = int(all_gather(torch.tensor(len(encoded), device=device), group).max())
    padded = torch.tensor(list(encoded.ljust(longest)), dtype=torch.uint8, device=device)
    return [bytes(text.tolist()).decode().rstrip(" ") for text in all_gather(padded, group)]


def start_all_reduce(x: Tensor, group: Group) -> Tensor:
    """Start to sum the ranks' x; ``wait`` returns the sum."""
    return _operators().all_reduce(x.contiguous(), "sum", group.name)  # type: ignore[no-any-return]


def wait(x: Tensor) -> Tensor:
    return _operators().wait_tensor(x)  # type: ignore[no-any-return]


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x."""
    return wait(start_all_reduce(x, group))


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """This rank's part, [m / n, ...], of the sum of the ranks' x, [m, ...]."""
    operators = _operators()
    found = operators.reduce_scatter_tensor(x.contiguous(), "sum", group.size, group.name)
    return operators.wait_tensor(found)  # type: ignore[no-any-return]


class SumOverGroup(torch.autograd.Function):
    """The sum of the ranks' x, added in the order of ranks.

    The loss is the sum of the ranks' losses, and each of them depends on this sum, so the gradient is a sum too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(x, group).sum(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradients[0], ctx.group).sum(0), None


class SumGradient(torch.autograd.Function):
    """x in another dtype. Each rank has a part of its gradient; the parts are summed over the ranks in that dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.dtype = group, x.dtype
        return x.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(gradients[0], ctx.group).to(ctx.dtype), None, None


class Gathered(torch.autograd.Function):
    """The ranks' x, [m, ...], gathered to [n m, ...] in another dtype. The gradient of x is summed over the ranks in
    that dtype and multiplied by a factor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dtype: torch.dtype, factor: int) -> Tensor:
        ctx.group, ctx.dtype, ctx.factor = group, x.dtype, factor
        return all_gather(x.contiguous(), group).flatten(0, 1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        found = reduce_scatter(gradients[0], ctx.group)
        return (found if ctx.factor == 1 else found * ctx.factor).to(ctx.dtype), None, None, None
