"""Builds the groups that operators take from users' arguments, for both levels, logits and linear heads."""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels.backends import choose
from unirl_kernels.backends.groups import ProgramArgs, ReadoutArgs
from unirl_kernels.batch import Batch
from unirl_kernels.checks import check_device, check_memory, name_of
from unirl_kernels.objectives import Loss
from unirl_kernels.operators.autograd import refuse_forward_mode
from unirl_kernels.operators.linear import SweepArgs
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout

EXACT_INTEGERS = {torch.float32: 2**24, torch.float64: 2**53}
"""The dtype represents every integer up to this number exactly."""


def per_row(per_token: Tensor) -> Tensor:
    """[B, L] contiguous, for both layouts; the packed one is B = 1."""
    return (per_token if per_token.dim() == 2 else per_token.unsqueeze(0)).contiguous()


def readout_args(readout: Readout, target: Tensor, dtype: torch.dtype, batch: Batch | None = None) -> ReadoutArgs:
    """A readout in the form that operators take, for rows of ``dtype``.

    Raises:
        ValueError: when a temperature has another shape than [S] or target's, is on another device, or has a shape that
            could be either.
    """
    temperature = readout.temperature
    if not isinstance(temperature, Tensor):
        if torch.compiler.is_compiling() and temperature != 1:
            # Numbers are constants in compiled code, so each new temperature would compile again.
            rows = torch.ones(target.shape, dtype=dtype, device=target.device) * temperature
            return ReadoutArgs(readout.scale, readout.softcap, 1.0, per_row(rows))
        return ReadoutArgs(readout.scale, readout.softcap, float(temperature), None)
    check_memory("temperature", temperature)
    refuse_forward_mode(temperature)
    check_device("temperature", temperature, target.device, "target")
    if batch is not None and not batch.shapes_tell:
        raise ValueError(
            f"temperature must be a number where target has {batch.n_sequences} tokens in as many sequences, some of "
            f"them empty or in compiled code, got shape {tuple(temperature.shape)}"
        )
    if temperature.shape != target.shape:
        sequences = target.shape[:1] if batch is None else (batch.n_sequences,)
        if temperature.shape != sequences or (batch is None and target.dim() == 1):
            raise ValueError(
                f"temperature must have shape {tuple(target.shape)} or one value per sequence, "
                f"got {tuple(temperature.shape)}"
            )
        temperature = temperature.unsqueeze(-1).expand(target.shape) if batch is None else batch.per_token(temperature)
    return ReadoutArgs(readout.scale, readout.softcap, 1.0, per_row(temperature).to(dtype))


def program_args(loss: Loss, batch: Batch, dtype: torch.dtype) -> ProgramArgs:
    """The program of a loss of token scope, with its fields in one tensor.

    Raises:
        TypeError: when a field has a dtype with which PyTorch would refuse an operation, or compute something else.
        ValueError: when the batch does not have a field, or a field requires a gradient, which one-pass kernels do not
            compute.
    """
    traced = loss.traced(batch.on_policy)
    loss.check_dtypes(batch)
    weights = loss.weights(batch)
    values = [_exact(name, loss.field(name, batch, weights), dtype) for name in traced.fields]
    # A constant objective has no fields, not even its weight.
    fields = (
        torch.stack(values) if values else torch.empty(0, *batch.target.shape, dtype=dtype, device=batch.target.device)
    )
    if batch.target.dim() == 1:
        fields = fields.unsqueeze(1)
    return ProgramArgs(traced.text, fields, loss.params(batch, dtype))


def _exact(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A field in the rows' dtype.

    Raises:
        ValueError: for a field that requires a gradient, and for an integer that would be rounded. On an accelerator,
            reading values would wait for the device; there such integers become NaN.
    """
    if value.requires_grad:
        raise ValueError(
            f"fields[{name!r}] must not require a gradient in a one-pass kernel, which does not compute it: detach "
            "it, or use Plan(kernel='composed')"
        )
    refuse_forward_mode(value)
    largest = EXACT_INTEGERS[dtype]
    if value.is_floating_point() or value.dtype == torch.bool or torch.iinfo(value.dtype).max <= largest:
        return value.to(dtype)
    # As int64, since the bound would wrap around in a narrower dtype.
    wide = value.double() if value.dtype == torch.uint64 else value.to(torch.int64)
    rounded = (wide > largest) | (wide < -largest)
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return value.to(dtype).masked_fill(rounded, torch.nan)
    if bool(rounded.any()):
        raise ValueError(
            f"fields[{name!r}] must hold integers of at most {largest} in size in a one-pass kernel, which computes in "
            f"{name_of(dtype)}, got {int(wide[rounded].flatten()[0])}"
        )
    return value.to(dtype)


def sweep_args(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> SweepArgs:
    """How the chunks of a head's logits are computed."""
    backend = choose(hidden.device, plan.backend, plan.kernel).backend
    return SweepArgs(_operand_dtype(hidden, weight, bias), plan.max_chunk_bytes, backend)


def _operand_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the matmuls' operands: the autocast dtype under autocast, else that of hidden, which all must
    have."""
    autocast = not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type)
    if autocast and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(hidden.device.type)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            unless = "" if autocast else " unless autocast is on"
            raise ValueError(f"{name} must be {name_of(hidden.dtype)} like hidden{unless}, got {name_of(value.dtype)}")
    return hidden.dtype
