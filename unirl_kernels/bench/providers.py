"""Who computes: the kernels of this package and its peers, as rows of one table."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

import unirl_kernels as uk
from unirl_kernels import backends
from unirl_kernels.bench.record import key
from unirl_kernels.bench.work import FUSED, Inputs, Values, Work

Function = Callable[[Tensor], Values]
"""From logits, [B, L, V], to what the mode asks for: the loss, or log-probability and entropy."""

Bind = Callable[[Inputs], Function]
"""Makes the function for some inputs; raises ``Skipped`` where there is none."""

OURS = "unirl_kernels"


class Skipped(Exception):
    """A provider does not take part; the message says why."""


@dataclass(frozen=True)
class Provider:
    """A kernel under comparison.

    Args:
        name: whose it is, as ``--peers`` spells it.
        kernel: which of theirs.
        bind: makes the function.
        overwrites: the gradient comes into the logits' memory.
    """

    name: str
    kernel: str
    bind: Bind
    overwrites: bool = False

    @property
    def key(self) -> str:
        """Names it among all providers."""
        return key(self.name, self.kernel, self.overwrites)


def needs(module: str, pip: str) -> ModuleType:
    """Import a peer's module, or skip the peer."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or "").split(".")[0]
        if missing == module.split(".")[0]:
            raise Skipped(f"not installed: pip install {pip}") from error
        raise Skipped(f"cannot be imported: {str(error).splitlines()[0]}") from error


def needs_gpu(work: Work) -> None:
    if torch.device(work.device).type != "cuda":
        raise Skipped("runs on a GPU only")


def needs_loss(work: Work, *losses: str) -> None:
    if work.mode != FUSED:
        raise Skipped("computes losses only, no statistics")
    if work.loss not in losses:
        raise Skipped(f"computes {' and '.join(losses)} only")


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
        if reason := backends.unavailable(plan.backend, inputs.logits.device):
            raise Skipped(reason)
        if plan.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            raise Skipped("interpreted: its time would mean nothing")
        batch, recipe = inputs.batch, inputs.work.recipe

        def loss(logits: Tensor) -> Values:
            out = uk.fused_loss(logits, batch, recipe, plan=plan)
            return Values(out.loss, out.logp)

        def statistics(logits: Tensor) -> Values:
            stats = uk.token_stats(logits, batch.target, plan=plan)
            return Values(None, stats.logp, stats.entropy)

        return loss if inputs.work.mode == FUSED else statistics

    return bind


def chosen(work: Work, kernels: Sequence[str], peers: Sequence[str], overwrite: bool | None = None) -> list[Provider]:
    """The providers that take part, ours first.

    Args:
        work: the work.
        kernels: of ours: ``all``, ``none``, or names such as ``cpu`` and ``cpu/rows``.
        peers: ``all``, ``none``, or names in ``peers.PEERS``.
        overwrite: True only those that overwrite the logits, False only those that do not, None both.

    Raises:
        ValueError: when there is none of a name.
    """
    from unirl_kernels.bench.peers import PEERS

    providers = [p for p in ours(work) if _named(kernels, p.kernel, p.kernel.split("/")[0])]
    providers += [p for p in PEERS if _named(peers, p.name)]
    known = {
        "kernels": {n for p in ours(work) for n in (p.kernel, p.kernel.split("/")[0])},
        "peers": {p.name for p in PEERS},
    }
    for option, names in (("kernels", kernels), ("peers", peers)):
        if unknown := set(names) - known[option] - {"all", "none"}:
            expected = ", ".join(("all", "none", *sorted(known[option])))
            raise ValueError(f"--{option} must be among {expected}, got {sorted(unknown)[0]!r}")
    if overwrite is None or not work.has_gradient:
        return [p for p in providers if work.has_gradient or not p.overwrites]
    return [p for p in providers if p.overwrites == overwrite]


def _named(names: Sequence[str], *of: str) -> bool:
    return "all" in names or bool(set(names) & set(of))
