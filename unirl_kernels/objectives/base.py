"""What a loss is: an objective and an aggregation."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from unirl_kernels.objectives.aggregate import Aggregation, PairMean, SequenceMean
from unirl_kernels.objectives.tokens import Tokens
from unirl_kernels.program import Traced, UnsupportedOperation, trace

SCOPES = ("token", "sequence", "pair")


@dataclass(frozen=True)
class Paradigm:
    """A row of the unified paradigm's table (Shao et al. 2024, arXiv:2402.03300v3, section 5.2)."""

    algorithm: str
    equations: str
    data_source: str
    reward: str
    objective: str
    coefficient: str


@dataclass(frozen=True)
class Loss:
    """A loss: what each token contributes, and how the contributions add up.

    An objective is any callable ``f(t)`` that returns the loss of each token from ``t.logp``, ``t.entropy``,
    ``t.lse``, ``t.old_logp``, ``t.ref_logp`` and ``t.advantage``. Its attribute ``scope`` says how far it looks:
    ``token`` (the default; read here once, differentiated, and run inside the one-pass kernels), ``sequence``
    (uses the methods of ``Tokens``, returns one loss per token) or ``pair`` (returns one loss per pair). An
    optional method ``metrics(t)`` returns named values per token.

    The objective is read when the loss is made: a closure that later changes a number it refers to changes
    nothing; make a new loss (a fraction of a millisecond, no compilation).

    Args:
        objective: the objective.
        aggregation: the weights of its values.

    Raises:
        TypeError: when the objective is not callable, or the aggregation has no weights.
        ValueError: when the scope is unknown or the aggregation does not fit it.
    """

    objective: Callable[[Any], Tensor]
    aggregation: Aggregation = SequenceMean()
    # Why an objective was refused is kept as text: an exception would keep every frame that it passed alive.
    _traced: Traced | str | None = field(init=False, repr=False, compare=False, default=None)
    _params: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.objective):
            raise TypeError(f"objective must be callable, got {self.objective!r} ({type(self.objective).__name__})")
        if isinstance(self.objective, type) and issubclass(self.objective, Objective):
            raise TypeError(f"objective must be made first, as in {self.objective.__name__}(), got the class")
        if isinstance(self.aggregation, type) or not callable(getattr(self.aggregation, "weights", None)):
            raise TypeError(
                "aggregation must have a method weights(batch), as SequenceMean() and TokenMean() do, "
                f"got {self.aggregation!r}"
            )
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if (self.scope == "pair") != isinstance(self.aggregation, PairMean):
            raise ValueError(f"aggregation of a {self.scope}-scope objective cannot be {self.aggregation}")
        traced: Traced | str | None = None
        if self.scope == "token":
            try:
                traced = trace(self.objective)
            except UnsupportedOperation as error:
                traced = str(error)
        params = traced.params if isinstance(traced, Traced) else ()
        object.__setattr__(self, "_traced", traced)
        object.__setattr__(self, "_params", torch.tensor(params, dtype=torch.float64, device="cpu"))

    @property
    def scope(self) -> str:
        return getattr(self.objective, "scope", "token")

    @property
    def paradigm(self) -> Paradigm | None:
        """The row of the paradigm's table, for the objectives that stand in it."""
        return getattr(self.objective, "paradigm", None)

    @property
    def traced(self) -> Traced:
        """The scalar program of a token-scope objective.

        Raises:
            UnsupportedOperation: when the objective uses an operation that one-pass kernels cannot run.
            ValueError: when it is not of token scope.
        """
        if isinstance(self._traced, str):
            raise UnsupportedOperation(self._traced)
        if self._traced is None:
            raise ValueError(f"a {self.scope}-scope objective has no scalar program")
        return self._traced

    def composed(self, tokens: Tokens, weights: Tensor) -> Tensor:
        """The loss as plain PyTorch, 0-dim: the sum of the objective's values times their weights.

        Args:
            tokens: the statistics of each place, and the batch's fields.
            weights: of each token or pair, as the aggregation gives them.

        Raises:
            TypeError: when the objective returns neither a tensor nor a number.
            ValueError: when it does not return one value per token or pair.
        """
        weights = weights.reshape(-1).to(tokens.logp.dtype)
        values = self._values(self.objective(tokens), weights)
        if values.shape != weights.shape:
            unit = "pair" if self.scope == "pair" else "token"
            raise ValueError(f"objective must return one loss per {unit}, {len(weights)}, got {tuple(values.shape)}")
        # Ignored places weigh 0, but 0 * inf would not be 0.
        return torch.where(weights == 0, torch.zeros_like(values), values * weights).sum()

    def _values(self, returned: object, like: Tensor) -> Tensor:
        """What the objective returned, in the statistics' dtype, as the one-pass kernels read it."""
        if isinstance(returned, numbers.Real):
            return torch.full_like(like, float(returned))
        if not isinstance(returned, Tensor):
            raise TypeError(f"objective must return a tensor of losses, got {type(returned).__name__}")
        # An objective that could be traced looks at tokens one by one: one value is a constant, not a reduction.
        constant = returned.numel() == 1 and isinstance(self._traced, Traced)
        return (returned.reshape(()).expand_as(like) if constant else returned).to(like.dtype)

    def params(self, device: torch.device) -> Tensor:
        """[n_params] float64: the program's parameters on ``device``."""
        if torch.compiler.is_compiling():
            return self._params.to(device)
        return _on_device(self.traced.params, device)


# Copied once per value: a CUDA graph cannot record a copy from pageable memory, and what it recorded must stay.
@lru_cache(maxsize=4096)
def _on_device(params: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(params, dtype=torch.float64, device=device)


class Objective:
    """Base of the objectives in the paradigm's table."""

    scope: ClassVar[str] = "token"
    paradigm: ClassVar[Paradigm | None] = None
