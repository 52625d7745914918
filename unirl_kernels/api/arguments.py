"""Checks of users' arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends import COMPOSED, Choice, choices_by_vocab, choose
from unirl_kernels.batch import Batch
from unirl_kernels.checks import check_device, check_layout, check_memory, check_target, has_values, name_of
from unirl_kernels.objectives import Loss
from unirl_kernels.operators.linear import HeadArgs
from unirl_kernels.operators.shards import Operators
from unirl_kernels.plan import Plan
from unirl_kernels.ranks.shard import VocabShard
from unirl_kernels.readout import Readout

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


MOST_COLUMNS = 2**24
"""Of a split vocabulary with observations: ranks exchange the argmax as a float."""


class Given(NamedTuple):
    """The unchecked arguments that functions on logits and on linear heads share, and the operators that they call."""

    operators: Operators
    target: Tensor
    readout: Readout
    plan: Plan
    shard: VocabShard | None
    of_loss: tuple[Batch, Loss] | None = None

    @property
    def batch(self) -> Batch | None:
        return None if self.of_loss is None else self.of_loss[0]

    def check_kinds(self) -> None:
        """Raise a ``TypeError`` unless batch, loss, readout and plan have their types."""
        if self.of_loss is not None:
            batch, loss = self.of_loss
            check_kind("batch", batch, Batch)
            check_kind("loss", loss, Loss)
        check_kind("readout", self.readout, Readout)
        check_kind("plan", self.plan, Plan)


def target_of(batch: object) -> Any:
    """The target of a batch. Something that is not a batch has none; ``check_kinds`` refuses it later."""
    return getattr(batch, "target", None)


def check_kind(name: str, value: object, kind: type) -> None:
    if isinstance(value, kind):
        return
    got = type(value)
    if got.__name__ == kind.__name__:  # of another copy of this package: a kernel of the Hub
        here, there = (x.__module__.split(".")[0] for x in (kind, got))
        raise TypeError(f"{name} must be a {kind.__name__} of {here}, got one of {there}: they share no types")
    raise TypeError(f"{name} must be a {kind.__name__}, got {got.__name__}")


def check_input(name: str, value: object) -> Tensor:
    """Check that a value is a dense tensor with memory, of a dtype that kernels support. Returns it.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    check_layout(name, value)
    check_whole(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(name_of, DTYPES))}, got {name_of(value.dtype)}")
    _check_readable(name, value)
    return value


def check_whole(name: str, value: Tensor) -> None:
    """Raise a ``ValueError`` for a sharded tensor, which looks like a small tensor."""
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
    """Raise if kernels would read freed memory, or values inside a function transform (torch.func)."""
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._functorch.is_functorch_wrapped_tensor(value) and has_values(value):
        raise NotImplementedError(
            f"{name} must not be transformed by torch.func (grad, vmap, jvp): call backward, and fold mapped "
            "dimensions into the batch"
        )
    check_memory(name, value)


def check_positions(name: str, value: Tensor, target: Tensor, last: str) -> None:
    """Raise a ``ValueError`` unless the shape is target's plus one dimension, called ``last``."""
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


def _check_part(hidden: Tensor, target: Tensor, shard: VocabShard) -> None:
    """Raise a ``ValueError`` unless hidden states belong to an equal part of target's sequences or positions."""
    parts, dim = shard.parts, 0 if shard.hidden == "fsdp" else -1
    shape = list(target.shape)
    if shape[dim] % parts:
        unit = "sequences" if dim == 0 and target.dim() == 2 else "tokens"
        raise ValueError(f"target must have a multiple of {parts} {unit} for hidden that is split, got {shape[dim]}")
    shape[dim] //= parts
    if hidden.dim() != target.dim() + 1 or list(hidden.shape[:-1]) != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"hidden must have shape ({expected}, D) on each of {parts} ranks, got {tuple(hidden.shape)}")


def check_logits(logits: Tensor, target: Tensor, shard: VocabShard | None = None) -> None:
    """Raise a ``TypeError`` or ``ValueError`` unless logits and target fit together. A shard may have no columns."""
    check_input("logits", logits)
    check_target(target)
    check_positions("logits", logits, target, "V")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"logits must be contiguous in the last dimension, got strides {logits.stride()}")
    check_device("target", target, logits.device, "logits")
    if logits.shape[-1] == 0 and shard is None:
        raise ValueError(f"logits must have at least one column, got shape {tuple(logits.shape)}")


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
    # Start at the smaller stride. Not by sorting: torch.compile can compare varying lengths, but not sort them.
    for stride, size in rows[::-1] if len(rows) == 2 and rows[0][0] > rows[1][0] else rows:
        if stride < reach:
            raise ValueError(f"overwrite_logits=True needs rows that do not overlap, got strides {logits.stride()}")
        reach += (size - 1) * stride


def check_head(head: HeadArgs, target: Tensor, shard: VocabShard | None = None) -> None:
    """Raise a ``TypeError`` or ``ValueError`` unless hidden, weight and bias fit together.

    With a shard, the weight may have no rows, and hidden may be a part of the whole.
    """
    check_target(target)
    for name, value in zip(HeadArgs._fields, head, strict=True):
        if name != "bias" or value is not None:
            check_device(name, check_input(name, value), target.device, "target")
    hidden, weight, bias = head
    if shard is None or shard.parts == 1:
        check_positions("hidden", hidden, target, "D")
    else:
        _check_part(hidden, target, shard)
    d = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != d:
        hint = "; it looks transposed" if weight.dim() == 2 and weight.shape[0] == d else ""
        raise ValueError(f"weight must have shape (V, {d}) for hidden of D = {d}, got {tuple(weight.shape)}{hint}")
    if d == 0 or (weight.shape[0] == 0 and shard is None):
        raise ValueError(f"weight must have at least one row and column, got shape {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_split(shard: VocabShard, columns: int, given: Given, device: torch.device) -> None:
    """Raise a ``ValueError`` if the call is not possible on a shard with this number of columns."""
    choose(device, given.plan.backend, given.plan.kernel)
    if given.of_loss is not None and given.plan.kernel not in (None, COMPOSED):  # no kernel sees a whole row
        raise ValueError(f"kernel must be None or {COMPOSED!r} for a split vocabulary, got {given.plan.kernel!r}")
    if not given.operators.in_tiles and shard.vocab > MOST_COLUMNS:
        raise ValueError(f"shard.vocab must be at most {MOST_COLUMNS} for observations, got {shard.vocab}")
    if shard.tiles is None:
        return
    if not given.operators.in_tiles:
        raise ValueError(f"shard.tiles must be None for observations, got {shard.tiles}")
    most = shard.slots * shard.tile
    if shard.used(columns) > most:
        raise ValueError(
            f"each of {shard.ranks.size} ranks must have at most {shard.slots} of {shard.tiles} tiles, {most} columns, "
            f"got {shard.used(columns)}"
        )


def kernel_of(loss: Loss, plan: Plan, device: torch.device, dtype: torch.dtype, vocab: int) -> Choice:
    """Backend and kernel for a loss of logits on a device, [..., vocab]; ``composed`` for a scope beyond single tokens.

    Raises:
        UnsupportedOperation: when an objective uses what a one-pass kernel cannot run.
        ValueError: when a one-pass kernel is named for an objective that needs ``composed``.
    """
    if loss.scope != "token":
        if plan.kernel not in (None, COMPOSED):
            raise ValueError(f"kernel must be {COMPOSED!r} for a {loss.scope}-scope objective, got {plan.kernel!r}")
        return Choice(choose(device, plan.backend, plan.kernel).backend, COMPOSED)
    for choice, most in choices_by_vocab(device, plan.backend, plan.kernel, dtype):  # noqa: B007
        if vocab <= most:
            break
    if choice.kernel != COMPOSED:
        loss.traced()  # raise for an unsupported operation, even if no gradient is wanted
    return choice
