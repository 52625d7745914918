"""This package's linear heads as providers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import unirl_kernels as uk
from benchmarks.inputs import Inputs, Values
from benchmarks.providers import OURS, Bind, Function, Provider, needs_backend
from benchmarks.work import DTYPES, FUSED, Work
from unirl_kernels import backends
from unirl_kernels.backends.groups import row_dtype


def ours(work: Work) -> Iterator[Provider]:
    """Every backend with its default kernel."""
    for backend in backends.MODULES:
        kernel = _one_pass(work, backend) if work.mode == FUSED else "statistics"
        plan = uk.Plan(backend, max_chunk_bytes=work.chunk_bytes)
        yield Provider(OURS, f"{backend}/{kernel}", _binder(plan))


def _one_pass(work: Work, backend: str) -> str:
    """The backend's default kernel, or its first one if the backend does not run here."""
    if work.recipe.scope != "token":
        return backends.COMPOSED
    device = torch.device(work.device)
    if backends.unavailable(backend, device):
        return (*backends.load(backend).KERNELS, backends.COMPOSED)[0]
    choices = backends.choices_by_vocab(device, backend, None, row_dtype(DTYPES[work.dtype]))
    return next(choice.kernel for choice, most in choices if work.vocab <= most)


def _binder(plan: uk.Plan) -> Bind:
    def bind(inputs: Inputs) -> Function:
        assert plan.backend is not None
        needs_backend(inputs.work, plan.backend)
        batch, recipe = inputs.batch, inputs.work.recipe

        def loss(hidden: Tensor, weight: Tensor) -> Values:
            out = uk.fused_linear_loss(hidden, weight, batch, recipe, plan=plan)
            return Values(out.loss, out.logp)

        def statistics(hidden: Tensor, weight: Tensor) -> Values:
            stats = uk.linear_token_stats(hidden, weight, batch.target, plan=plan)
            return Values(None, stats.logp, stats.entropy)

        return loss if inputs.work.mode == FUSED else statistics

    return bind
