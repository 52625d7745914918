"""Checks of what users give."""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels.backends import COMPOSED, Choice, choices_by_vocab, choose
from unirl_kernels.batch import Batch
from unirl_kernels.checks import check_device, check_dtype, check_layout, check_memory, has_values, name_of
from unirl_kernels.objectives import Loss
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_kinds(**values: object) -> None:
    """Raise a ``TypeError`` unless ``batch``, ``loss``, ``readout`` and ``plan`` are what they are called."""
    kinds = {"batch": Batch, "loss": Loss, "readout": Readout, "plan": Plan}
    for name, value in values.items():
        if not isinstance(value, kinds[name]):
            kind, got = kinds[name], type(value)
            if got.__name__ == kind.__name__:  # a kernel of the Hub beside the installed package, or two kernels
                here, there = (x.__module__.split(".")[0] for x in (kind, got))
                raise TypeError(f"{name} must be a {kind.__name__} of {here}, got one of {there}: they share no types")
            raise TypeError(f"{name} must be a {kind.__name__}, got {got.__name__}")


def check_input(name: str, value: object) -> Tensor:
    """The value, if it is a dense tensor of a dtype that kernels compute on, with memory behind it.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor: pack it, with cu_seqlens" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    check_whole(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(name_of, DTYPES))}, got {name_of(value.dtype)}")
    _check_readable(name, value)
    return value


def check_whole(name: str, value: Tensor) -> None:
    """Raise a ``ValueError`` for sharded tensors: a shard looks like a small tensor."""
    if hasattr(value, "full_tensor"):
        raise ValueError(
            f"{name} must be a whole tensor, got a DTensor: compute the loss in the forward of the module that holds "
            "the parameter, where FSDP2 has gathered it, or pass full_tensor(grad_placements=[Partial('avg')]), whose "
            "gradient is the mean over ranks as FSDP2 wants it"
        )
    if hasattr(value, "ds_id") and value.numel() == 0:
        raise ValueError(
            f"{name} must be a whole tensor, got one that ZeRO-3 has partitioned: gather it around forward and "
            "backward with deepspeed.zero.GatheredParameters"
        )


def _check_readable(name: str, value: Tensor) -> None:
    """Raise where kernels would read memory that is gone, or values that only a function transform has."""
    if torch.compiler.is_compiling() or not has_values(value):
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise NotImplementedError(
            f"{name} must not be transformed by torch.func (grad, vmap, jvp): call backward, and fold mapped "
            "dimensions into the batch"
        )
    check_memory(name, value)


def check_positions(name: str, value: Tensor, target: Tensor, last: str) -> None:
    """Raise a ``ValueError`` unless the shape is target's, and one dimension more, called ``last``."""
    check_layout(target)
    if value.dim() != target.dim() + 1 or value.shape[:-1] != target.shape:
        expected = ", ".join(str(n) for n in target.shape)
        shape, hint = tuple(value.shape), ""
        if shape == (0,):
            hint = "; its memory was given to the gradient by overwrite_logits=True"
        elif value.dim() > 3:
            hint = f"; fold its first dimensions into the batch: {name}.flatten(0, -3), and target's likewise"
        elif value.dim() == 1:
            hint = f"; a single position is {name}.unsqueeze(0)"
        raise ValueError(f"{name} must have shape ({expected}, {last}), got {shape}{hint}")


def _check_part(name: str, value: Tensor, target: Tensor, parts: int, dim: int) -> None:
    """Raise a ``ValueError`` unless a value has an equal part of target's dimension dim, and one dimension more."""
    check_layout(target)
    shape = list(target.shape)
    if shape[dim] % parts:
        unit = "sequences" if dim == 0 and target.dim() == 2 else "tokens"
        raise ValueError(f"target must have a multiple of {parts} {unit} for hidden that is split, got {shape[dim]}")
    shape[dim] //= parts
    if value.dim() != target.dim() + 1 or list(value.shape[:-1]) != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape ({expected}, D) on each of {parts} ranks, got {tuple(value.shape)}")


def check_logits(logits: Tensor, target: Tensor) -> None:
    """Raise a ``TypeError`` or ``ValueError`` unless logits and target fit each other."""
    check_shard_of_logits(logits, target)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one column, got shape {tuple(logits.shape)}")


def check_shard_of_logits(logits: Tensor, target: Tensor) -> None:
    """As ``check_logits``, but a shard may have no columns."""
    check_input("logits", logits)
    check_dtype("target", target, torch.int64)
    check_memory("target", target)
    check_positions("logits", logits, target, "V")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"logits must be contiguous in the last dimension, got strides {logits.stride()}")
    check_device("target", target, logits.device, "logits")


def wants_gradient(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad


def check_overwritable(logits: Tensor) -> None:
    """Raise a ``ValueError`` for logits whose memory cannot take their gradient."""
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        raise ValueError(
            "overwrite_logits=True needs logits that were computed; "
            "got a leaf that requires a gradient, or a view of one"
        )
    reach = logits.shape[-1]
    rows = [(stride, size) for stride, size in zip(logits.stride()[:-1], logits.shape[:-1], strict=True) if size > 1]
    # From the smaller stride; torch.compile compares lengths that vary, but cannot sort them.
    for stride, size in rows[::-1] if len(rows) == 2 and rows[0][0] > rows[1][0] else rows:
        if stride < reach:
            raise ValueError(f"overwrite_logits=True needs rows that do not overlap, got strides {logits.stride()}")
        reach += (size - 1) * stride


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    """Raise a ``TypeError`` or ``ValueError`` unless the parts of a linear head fit one another."""
    check_shard_of_head(hidden, weight, bias, target)
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row and column, got shape {tuple(weight.shape)}")


def check_shard_of_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, parts: int = 1, dim: int = -1
) -> None:
    """As ``check_head``, but a shard may have no rows, and hidden one of several equal parts of target along dim."""
    check_dtype("target", target, torch.int64)
    check_memory("target", target)
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if name != "bias" or value is not None:
            check_device(name, check_input(name, value), target.device, "target")
    if parts == 1:
        check_positions("hidden", hidden, target, "D")
    else:
        _check_part("hidden", hidden, target, parts, dim)
    d = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != d:
        hint = "; it looks transposed" if weight.dim() == 2 and weight.shape[0] == d else ""
        raise ValueError(f"weight must have shape (V, {d}) for hidden of D = {d}, got {tuple(weight.shape)}{hint}")
    if d == 0:
        raise ValueError(f"weight must have at least one row and column, got shape {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def kernel_of(loss: Loss, plan: Plan, device: torch.device, dtype: torch.dtype, vocab: int) -> Choice:
    """Backend and kernel that compute a loss; the kernel is ``composed`` for what looks beyond single tokens.

    Args:
        loss: of any scope.
        plan: may name them.
        device: of the logits.
        dtype: of the logits.
        vocab: columns of the logits.

    Raises:
        UnsupportedOperation: when an objective uses what a one-pass kernel cannot run.
        ValueError: when a one-pass kernel is named for an objective that needs another.
    """
    if loss.scope != "token":
        if plan.kernel not in (None, COMPOSED):
            raise ValueError(f"kernel must be {COMPOSED!r} for a {loss.scope}-scope objective, got {plan.kernel!r}")
        return Choice(choose(device, plan.backend, plan.kernel).backend, COMPOSED)
    for choice, most in choices_by_vocab(device, plan.backend, plan.kernel, dtype):  # noqa: B007
        if vocab <= most:
            break
    if choice.kernel != COMPOSED:
        loss.traced()  # must not pass where no gradient is wanted
    return choice
