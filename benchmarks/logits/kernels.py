"""This package's kernels as providers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

import unirl_kernels as uk
from benchmarks.inputs import Inputs, Values
from benchmarks.providers import OURS, Bind, Function, Provider, needs_backend
from benchmarks.work import FUSED, Work
from unirl_kernels import backends


def ours(work: Work) -> Iterator[Provider]:
    """Every backend with every kernel, into fresh memory and in place."""
    for backend in backends.MODULES:
        # Statistics are the same for every one-pass kernel.
        one_pass = backends.load(backend).KERNELS if work.mode == FUSED and work.recipe.scope == "token" else ()
        for kernel in (*one_pass, backends.COMPOSED if work.mode == FUSED else "statistics"):
            for overwrites in (False, True) if work.has_gradient else (False,):
                plan = uk.Plan(backend, kernel if work.mode == FUSED else None, overwrite_logits=overwrites)
                yield Provider(OURS, f"{backend}/{kernel}", _binder(plan), overwrites)


def _binder(plan: uk.Plan) -> Bind:
    def bind(inputs: Inputs) -> Function:
        assert plan.backend is not None
        needs_backend(inputs.work, plan.backend)
        batch, recipe = inputs.batch, inputs.work.recipe

        def loss(logits: Tensor) -> Values:
            out = uk.fused_loss(logits, batch, recipe, plan=plan)
            return Values(out.loss, out.logp)

        def statistics(logits: Tensor) -> Values:
            stats = uk.token_stats(logits, batch.target, plan=plan)
            return Values(None, stats.logp, stats.entropy)

        return loss if inputs.work.mode == FUSED else statistics

    return bind
