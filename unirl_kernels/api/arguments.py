"""What operators take, made from what users give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unirl_kernels import ops
from unirl_kernels.backends import COMPOSED, Choice, ReadoutArgs, choose
from unirl_kernels.batch import Batch
from unirl_kernels.objectives import Loss
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_kinds(**values: object) -> None:
    """Raise a ``TypeError`` unless ``batch``, ``loss``, ``readout`` and ``plan`` are what they are called."""
    kinds = {"batch": Batch, "loss": Loss, "readout": Readout, "plan": Plan}
    for name, value in values.items():
        if not isinstance(value, kinds[name]):
            raise TypeError(f"{name} must be a {kinds[name].__name__}, got {type(value).__name__}")


def check_numbers(name: str, value: object) -> Tensor:
    """The value, if it is a tensor of a dtype that kernels compute on; else a ``TypeError`` that names the argument."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(name_of, DTYPES))}, got {name_of(value.dtype)}")
    return value


def check_device(name: str, value: Tensor, device: torch.device, like: str) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like {like}, got {value.device}")


def check_whole(name: str, value: object) -> None:
    """Raise a ``ValueError`` unless a tensor is all there: a piece of a parameter looks like a small one."""
    if hasattr(value, "full_tensor"):
        raise ValueError(
            f"{name} must be a whole tensor, got a DTensor: compute the loss in the forward of the module that holds "
            "the parameter, where FSDP2 has gathered it, or pass its full_tensor()"
        )
    if hasattr(value, "ds_id") and isinstance(value, Tensor) and value.numel() == 0:
        raise ValueError(
            f"{name} must be a whole tensor, got one that ZeRO-3 has partitioned: gather it around forward and "
            "backward with deepspeed.zero.GatheredParameters"
        )


def check_places(name: str, value: Tensor, target: Tensor, last: str) -> None:
    """Raise a ``ValueError`` unless the shape is target's, and one dimension more, called ``last``."""
    if target.dim() not in (1, 2) or value.dim() != target.dim() + 1 or value.shape[:-1] != target.shape:
        expected = ", ".join(str(n) for n in target.shape)
        raise ValueError(f"{name} must have shape ({expected}, {last}), got {tuple(value.shape)}")


def check_targets(target: Tensor, vocab: int) -> None:
    """As the operators do, but by its place in the layout that the user gave; a compiler leaves it to them."""
    if not torch.compiler.is_compiling():
        ops.check_targets(target, vocab)


def places(per_token: Tensor) -> Tensor:
    """[B, L] of either layout; the packed one is B = 1."""
    return (per_token if per_token.dim() == 2 else per_token.unsqueeze(0)).contiguous()


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def kernel_of(loss: Loss, plan: Plan, device: torch.device) -> Choice:
    """Backend and kernel that compute a loss; the kernel is ``composed`` for what looks beyond single tokens.

    Raises:
        UnsupportedOperation: when the objective uses what a one-pass kernel cannot run.
        ValueError: when a one-pass kernel is named for an objective that needs another.
    """
    choice = choose(device, plan.backend, plan.kernel)
    if loss.scope != "token":
        if plan.kernel not in (None, COMPOSED):
            raise ValueError(f"kernel must be {COMPOSED!r} for a {loss.scope}-scope objective, got {plan.kernel!r}")
        return Choice(choice.backend, COMPOSED)
    if choice.kernel != COMPOSED:
        loss.traced  # noqa: B018  must not pass where no gradient is wanted
    return choice


def row_weights(loss: Loss, batch: Batch, dtype: torch.dtype) -> Tensor:
    return places(loss.aggregation.weights(batch)).to(dtype)


def row_fields(reads: frozenset[str], batch: Batch, dtype: torch.dtype) -> Sequence[Tensor | None]:
    """advantage, old_logp, ref_logp as [B, L], where the objective reads them.

    Raises:
        ValueError: when it reads one that the batch lacks.
    """
    found: list[Tensor | None] = []
    for name in ("advantage", "old_logp", "ref_logp"):
        value: Tensor | None = getattr(batch, name) if name in reads else None
        if value is None:
            if name in reads and name != "old_logp":
                raise ValueError(f"the objective reads {name}, but batch.{name} is None")
            found.append(None)
            continue
        if value.shape != batch.target.shape:
            value = batch.per_token(value)
        found.append(places(value).to(dtype))
    return found


def readout_arguments(readout: Readout, target: Tensor, dtype: torch.dtype) -> ReadoutArgs:
    """A readout as backends take it."""
    temperature = readout.temperature
    if not isinstance(temperature, Tensor):
        return ReadoutArgs(readout.scale, readout.softcap, float(temperature), None)
    if temperature.shape != target.shape:
        raise ValueError(f"temperature must have shape {tuple(target.shape)}, got {tuple(temperature.shape)}")
    check_device("temperature", temperature, target.device, "target")
    return ReadoutArgs(readout.scale, readout.softcap, 1.0, places(temperature).to(dtype))
