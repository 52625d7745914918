"""Scopes: an objective declares which tokens its loss depends on, and a small synthetic batch checks it.

An objective of token, sequence or pair scope may be run on a part of the batch: linear heads do so in chunks. Its
losses on a part must equal those on the whole batch. The check runs it on both, once when a loss is made, on the CPU.
If it fails, making the loss warns, and linear heads refuse the loss. On logits the whole batch is there, so it runs.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from unirl_kernels.batch import IGNORE, Batch
from unirl_kernels.objectives.tokens import Tokens
from unirl_kernels.program.trace import name_of

SCOPES = ("token", "sequence", "pair", "batch")
"""From the narrowest to the widest."""

Objective = Callable[[Any], Any]

LENGTHS = torch.tensor([3, 2, 4, 2], device="cpu")
"""Tokens of the synthetic sequences; the second token of all is ignored."""

IGNORED = 1

KINDS = (torch.float64, torch.bool, torch.int64)
"""Dtypes that a user's field may have; the objective decides which make sense."""

MAX_TRIES = 81


def scope_of(objective: object) -> str:
    return str(getattr(objective, "scope", "token"))


def scope_fault(objective: Objective) -> str | None:
    """Check an objective on parts of the synthetic batch.

    Returns:
        A sentence that names the objective, says why it must not be run on parts of a batch, and what to do: its loss
        depends on more tokens than its scope allows, or it cannot be run on the synthetic batch. None if all is well.
    """
    scope = scope_of(objective)
    if scope == "batch":
        return None
    # Frozen dataclasses are checked once per value. Functions are equal only to themselves.
    by_value = hasattr(objective, "__dataclass_params__") and type(objective).__hash__ is not None
    fault = _remembered_fault(objective) if by_value else _fault(objective)
    if fault is None:
        return None
    return (
        f"objective {name_of(objective)} of scope {scope!r} {fault}. Give it scope = 'batch' if it is to see all of "
        "the batch; pass tensors as Batch(fields=...), not as captured variables"
    )


@lru_cache(maxsize=1024)
def _remembered_fault(objective: Objective) -> str | None:
    return _fault(objective)


def _fault(objective: Objective) -> str | None:
    """What is wrong with an objective's scope; None if nothing."""
    first: str | None = None
    names: tuple[str, ...] = ()
    kinds_of_names: Iterator[tuple[torch.dtype, ...]] = iter([()])
    with (
        _no_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        _no_hooks(),
    ):
        for _ in range(MAX_TRIES):
            kinds = next(kinds_of_names, None)
            if kinds is None:
                break
            synthetic = Synthetic(dict(zip(names, kinds, strict=True)))
            try:
                return _difference(objective, synthetic)
            except Exception as error:
                first = first or f"cannot be run on a synthetic batch ({type(error).__name__}: {error})"
            if len(synthetic.fields) > len(names):
                # Fields become known when the objective reads them: start again, with every dtype for the fields known
                # now.
                names = tuple(synthetic.fields)
                kinds_of_names = itertools.product(KINDS, repeat=len(names))
    return first


def _no_hooks() -> AbstractContextManager[None]:
    """Hide the saved tensors of the check from an enclosing activation checkpoint."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # type: ignore[no-any-return]


@contextmanager
def _no_modes() -> Iterator[None]:
    """Leave the caller's FakeTensorMode, torch.func and default device: the result is cached for other calls."""
    with _disable_current_modes(), temporarily_clear_interpreter_stack(), torch.device("cpu"):
        yield


def _difference(objective: Objective, synthetic: Synthetic) -> str | None:
    scope = scope_of(objective)
    whole, *parts = PARTS[scope]
    unit = "pair" if scope == "pair" else "token"
    of_whole = _run(objective, synthetic, whole)
    for part in parts:
        of_part = _run(objective, synthetic, part)
        if of_whole.losses.shape != whole.units.shape or of_part.losses.shape != part.units.shape:
            got = tuple(of_whole.losses.shape)
            return f"must return one loss per {unit}, {len(whole.units)} of the synthetic batch, got shape {got}"
        if not _equal(of_part.losses, of_whole.losses[part.units]):
            return f"gives a {unit} another loss when other {scope}s are left out"
        if not _equal(of_part.gradient, of_whole.gradient[:, part.tokens]):
            return f"gives a {unit} another gradient when other {scope}s are left out"
    return None


class Part(NamedTuple):
    """A part of the synthetic batch."""

    tokens: Tensor  # [n] int64
    lengths: Tensor  # tokens of each sequence that are in the part
    sequences: Tensor  # [m] int64
    units: Tensor  # tokens, or pairs


def _sequences(*indices: int, units: tuple[int, ...] | None = None) -> Part:
    ends = LENGTHS.cumsum(0)
    tokens = torch.cat([torch.arange(int(ends[s] - LENGTHS[s]), int(ends[s])) for s in indices])
    at = torch.tensor(indices)
    return Part(tokens, LENGTHS[at], at, tokens if units is None else torch.tensor(units))


def _parts() -> dict[str, tuple[Part, ...]]:
    return {
        # Cut inside a sequence: the third one has one token before the cut and three after it.
        "token": (
            _sequences(0, 1, 2, 3),
            Part(torch.arange(6), torch.tensor([3, 2, 1]), torch.tensor([0, 1, 2]), torch.arange(6)),
            Part(torch.arange(6, 11), torch.tensor([3, 2]), torch.tensor([2, 3]), torch.arange(6, 11)),
        ),
        "sequence": (_sequences(0, 1, 2, 3), _sequences(0, 1), _sequences(2, 3)),
        "pair": (
            _sequences(0, 1, 2, 3, units=(0, 1)),
            _sequences(0, 2, units=(0,)),
            _sequences(1, 3, units=(1,)),
        ),
    }


with torch.device("cpu"):  # not the default device of who imports this
    PARTS = _parts()
"""The whole synthetic batch and its parts, by scope."""


class Synthetic:
    """Random statistics and fields of the synthetic batch; fields are made when an objective first reads them.

    Args:
        kinds: dtypes of fields known before; others are float64.
    """

    def __init__(self, kinds: dict[str, torch.dtype]) -> None:
        self._random = torch.Generator("cpu").manual_seed(0)
        self._kinds = kinds
        self.fields: dict[str, Tensor] = {}
        n = int(LENGTHS.sum())
        valid = torch.arange(n) != IGNORED
        self.target = torch.where(valid, 1, IGNORE)
        draws = torch.rand(5, n, dtype=torch.float64, generator=self._random) + 0.1
        self.stats = torch.where(valid, draws[:3] * torch.tensor([[-1.0], [1.0], [2.0]], dtype=torch.float64), 0)
        self.old_logp, self.ref_logp = -draws[3], -draws[4]
        self.weights = torch.rand(n, dtype=torch.float64, generator=self._random) + 0.5

    def of_sequences(self, name: str) -> Tensor:
        """[4]: a field with a value for each sequence."""
        if name not in self.fields:
            kind = self._kinds.get(name, torch.float64)
            values = torch.randn(2, dtype=kind, generator=self._random) if kind.is_floating_point else torch.arange(2)
            # Both kinds of parts split the groups, so that an objective that reads the rest of a group is found.
            self.fields[name] = values.to(kind)[torch.tensor([0, 1, 1, 0])]
        return self.fields[name]


class Probe(Tokens):
    """The tokens of a part of the synthetic batch. Any field that is read exists."""

    def __init__(self, synthetic: Synthetic, part: Part, stats: Tensor) -> None:
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), part.lengths.cumsum(0)])
        old_logp, ref_logp = synthetic.old_logp[part.tokens], synthetic.ref_logp[part.tokens]
        super().__init__(Batch(synthetic.target[part.tokens], None, old_logp, ref_logp, cu_seqlens), *stats)
        self._synthetic, self._part = synthetic, part

    def _per_token(self, name: str) -> Tensor:
        if name in ("old_logp", "ref_logp"):
            return self._batch.per_token_field(name)
        return self._batch.per_token(self.sequence_field(name))

    def sequence_field(self, name: str) -> Tensor:
        return self._synthetic.of_sequences(name)[self._part.sequences]


class Outcome(NamedTuple):
    losses: Tensor
    gradient: Tensor  # [3, tokens], with respect to logp, entropy, lse


def _run(objective: Objective, synthetic: Synthetic, part: Part) -> Outcome:
    stats = synthetic.stats[:, part.tokens].requires_grad_()
    losses = objective(Probe(synthetic, part, stats))
    if not isinstance(losses, (Tensor, numbers.Real)):
        raise TypeError(f"objective must return a tensor of losses, got {type(losses).__name__}")
    if isinstance(losses, numbers.Real):
        losses = torch.full(part.units.shape, float(losses), dtype=torch.float64)
    if losses.shape != part.units.shape or not losses.requires_grad:
        return Outcome(losses.detach(), torch.zeros_like(stats))
    used = synthetic.weights[part.units]
    (gradient,) = torch.autograd.grad((losses * used).sum(), stats, allow_unused=True)
    return Outcome(losses.detach(), torch.zeros_like(stats) if gradient is None else gradient)


def _equal(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x.double(), y.double(), rtol=1e-6, atol=1e-9, equal_nan=True)
