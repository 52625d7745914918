"""``Loss``: objectives with their aggregations, and sums of them."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from unirl_kernels.batch import RESERVED, Batch
from unirl_kernels.checks import has_values
from unirl_kernels.checks import name_of as dtype_name
from unirl_kernels.objectives.aggregate import Aggregation, SequenceMean
from unirl_kernels.objectives.arguments import Parameters
from unirl_kernels.objectives.scopes import SCOPES, scope_fault, scope_of
from unirl_kernels.objectives.term import Term, check_aggregation, written
from unirl_kernels.objectives.tokens import Tokens
from unirl_kernels.program import DEMANDS, STATISTICS, Traced, UnsupportedOperation, trace, weight_name
from unirl_kernels.program.trace import name_of

BEYOND_ONE_TOKEN = RESERVED - set(STATISTICS)
Metrics = Mapping[str, Tensor | tuple[Tensor, Tensor]]
"""Named values per token, sequence or pair; (values, counted) if only some of them count."""


@dataclass(frozen=True)
class Paradigm:
    """A row of the unified paradigm's table (Shao et al. 2024, arXiv:2402.03300v3, section 5.2)."""

    algorithm: str
    equations: str
    data_source: str
    reward: str
    objective: str
    coefficient: str


class Objective(Parameters):
    """Base of the published objectives: frozen dataclasses that check their parameters."""

    scope: ClassVar[str] = "token"
    paradigm: ClassVar[Paradigm | None] = None

    def __call__(self, t: Tokens) -> Tensor:
        """The loss of each token, or of each pair."""
        raise NotImplementedError

    def metrics(self, t: Tokens) -> Metrics:
        """Named values of each token, sequence or pair, for ``LossOutput.metrics``."""
        return {}


class Loss:
    """A loss: an objective, which gives each token or pair a loss, and an aggregation, which gives it a weight.

        L = sum_t w_t f(t)

    An objective is any callable ``f(t)`` that returns the loss of each token from ``t.logp``, ``t.entropy``, ``t.lse``
    and the fields of the batch, such as ``t.advantage``. Its attribute ``scope`` says which tokens a loss depends on:

    - ``token`` (the default): this token. The objective is traced once, differentiated, and run inside the one-pass
      kernels.
    - ``sequence``: its whole sequence, by the methods of ``Tokens``. Returns one loss per token.
    - ``pair``: a pair of sequences. Returns one loss per pair.
    - ``batch``: the whole batch, which is then never cut into chunks. Returns one loss per token, or one per pair if
      the aggregation weighs pairs.

    An optional method ``metrics(t)`` returns named values per token, sequence or pair. It returns (values, counted) for
    a name if only some of its values count.

    Losses can be added and multiplied by a number or a 0-dim tensor. Each term of a sum keeps its aggregation. Terms of
    token scope run in one pass together.

    The objective is traced when the loss is made, which takes a fraction of a millisecond and compiles nothing. If it
    reads a number from outside and the number changes later, make a new loss: one-pass kernels go on with the old
    number, and calls without a gradient read the new one. A loss may also be made inside a compiled function
    (torch.compile); numbers that change are then variables of its graph. The scope is not checked there, since compiled
    code never cuts a batch into chunks.

    Args:
        objective: the objective.
        aggregation: the weights of its values.

    Raises:
        TypeError: when the objective is not callable, or the aggregation has no weights.
        ValueError: when the scope is unknown, or the aggregation does not fit it.

    Warns:
        UserWarning: when the objective depends on more tokens than its scope allows. ``fused_linear_loss`` refuses it.

    Examples:
        An objective of your own, and an entropy bonus:

        >>> surrogate = uk.Loss(lambda t: -torch.exp(t.logp - t.old_logp) * t.advantage, uk.TokenMean())
        >>> loss = surrogate - 0.01 * uk.Loss(lambda t: t.entropy, uk.TokenMean())
        >>> batch = uk.Batch(torch.tensor([[3, 1]]), advantage=torch.tensor([2.0]))
        >>> uk.fused_loss(torch.zeros(1, 2, 4), batch, loss).loss  # -2 - 0.01 log 4
        tensor(-2.0139)
    """

    terms: tuple[Term, ...]
    """The objectives with their aggregations and coefficients; one, unless the loss is a sum."""
    scope: str
    """The widest scope of the terms."""

    # The default is a class: torch.compile cannot name an object that is the default of a method.
    def __init__(
        self, objective: Callable[[Any], Tensor], aggregation: Aggregation | type[SequenceMean] = SequenceMean
    ) -> None:
        aggregation = SequenceMean() if aggregation is SequenceMean else cast(Aggregation, aggregation)
        _check_objective(objective)
        check_aggregation(aggregation, scope_of(objective))
        self._set_terms((Term(objective, aggregation),))
        # Not under torch.compile, which would compile the check too: compiled code never cuts a batch of an untraced
        # loss.
        if not torch.compiler.is_compiling() and (self.scope != "token" or isinstance(self._traced, str)):
            self._fault = scope_fault(objective)
            if self._fault is not None:
                warnings.warn(f"{self._fault}. Linear heads refuse it", stacklevel=2)

    def _set_terms(self, terms: tuple[Term, ...], fault: str | None = None) -> None:
        self.terms = terms
        self._fault = fault
        self.scope = SCOPES[max([SCOPES.index(term.scope) for term in terms])]
        # Keep the reason as text: an exception would keep alive every frame that it passed.
        self._traced: str | tuple[Traced, Traced] | None = None
        self._params: tuple[Tensor, Tensor] | None = None
        if self.scope != "token":
            return
        objectives = [term.objective for term in terms]
        try:
            sampled = trace(objectives, BEYOND_ONE_TOKEN)
            on_policy = trace(objectives, BEYOND_ONE_TOKEN, on_policy=True) if "old_logp" in sampled.fields else sampled
        except UnsupportedOperation as error:
            self._traced = error.args[0]
        else:
            self._traced = (sampled, on_policy)
            if not torch.compiler.is_compiling():
                self._params = (_tensor(sampled.params), _tensor(on_policy.params))

    @classmethod
    def _of(cls, terms: tuple[Term, ...], fault: str | None) -> Loss:
        loss = object.__new__(cls)
        loss._set_terms(terms, fault)
        return loss

    def check_scopes(self) -> None:
        """Check that the loss may be computed on parts of a batch.

        Raises:
            ValueError: when an objective depends on more tokens than its scope allows; names it and says what to do.
        """
        if self._fault is not None:
            raise ValueError(self._fault)

    @property
    def _single(self) -> Term:
        if len(self.terms) != 1:
            raise AttributeError(f"a sum of {len(self.terms)} losses has no objective of its own; see loss.terms")
        return self.terms[0]

    @property
    def objective(self) -> Callable[[Any], Tensor]:
        """The objective of a loss that is not a sum."""
        return self._single.objective

    @property
    def aggregation(self) -> Aggregation:
        """The aggregation of a loss that is not a sum."""
        return self._single.aggregation

    @property
    def paradigm(self) -> Paradigm | None:
        """The row of the paradigm's table; None if the objective is not in the table."""
        return getattr(self.terms[0].objective, "paradigm", None) if len(self.terms) == 1 else None

    def traced(self, on_policy: bool = False) -> Traced:
        """The scalar program of a loss of token scope.

        Args:
            on_policy: whether the batch has no ``old_logp``.

        Raises:
            UnsupportedOperation: when an objective uses an operation that one-pass kernels cannot run.
            ValueError: when it is not of token scope.
        """
        if isinstance(self._traced, str):
            raise UnsupportedOperation(self._traced)
        if self._traced is None:
            raise ValueError(f"a {self.scope}-scope objective has no scalar program")
        return self._traced[int(on_policy)]  # torch.compile of torch 2.11 takes no bool for an index

    def check_dtypes(self, batch: Batch) -> None:
        """Check that PyTorch computes with the batch's fields what the program does.

        Raises:
            TypeError: naming a field whose dtype would change the value.
        """
        traced = self.traced(batch.on_policy)
        given = batch.given() if traced.demands else {}
        for kind, names, use in traced.demands:
            dtypes = [given[name].dtype for name in names if name in given]
            if len(dtypes) < len(names):
                continue  # a field that is read and absent has an error of its own
            if kind == "bool":
                met = all(x == torch.bool for x in dtypes)
            else:
                met = any(x.is_floating_point or (kind == "number" and x != torch.bool) for x in dtypes)
            if not met:
                fields = " or ".join([f"fields[{name!r}]" for name in names])
                raise TypeError(
                    f"{fields} must be {DEMANDS[kind]} in a one-pass kernel, since the objective {use} it, got "
                    f"{', '.join([dtype_name(x) for x in dtypes])}: convert the field, or use Plan(kernel='composed')"
                )

    def params(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        """[n_params] float64: the program's parameters for rows in ``dtype`` of a batch, on its device.

        Rounded to fp32 unless rows are fp64, as PyTorch rounds numbers: a field with 0.1 is then equal to 0.1.
        """
        traced, device = self.traced(batch.on_policy), batch.target.device
        params = traced.params
        if traced.graph.limits:
            params = traced.params_of(dtype, [name for name, x in batch.given().items() if x.dtype == torch.float64])
        if torch.compiler.is_compiling():
            kept = None if traced.graph.limits else self._params
            # Without waiting for the device: a copy from pageable memory is staged before the call returns.
            copy = None if kept is None else kept[int(batch.on_policy)].to(device, non_blocking=True)
            return _rounded(_compiled(params, device) if copy is None else copy, dtype)
        # Do not cache tensors made in FakeTensorMode.
        return _on_device(params, device, dtype) if has_values(batch.target) else _tensor(params).to(device)

    def composed(self, tokens: Tokens, weights: Sequence[Tensor]) -> Tensor:
        """The loss as plain PyTorch, 0-dim: the sum of its terms, each with its weights (see ``Term.composed``)."""
        values = self.values(tokens, weights)
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def values(self, tokens: Tokens, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The value of each term, 0-dim."""
        constant = isinstance(self._traced, tuple)
        return tuple(term.composed(tokens, w, constant) for term, w in zip(self.terms, weights, strict=True))

    def weights(self, batch: Batch) -> tuple[Tensor, ...]:
        """Weights of each term's tokens or pairs; see ``Term.weights``."""
        return tuple(term.weights(batch) for term in self.terms)

    def field(self, name: str, batch: Batch, weights: tuple[Tensor, ...]) -> Tensor:
        """A field of the loss's program: the weight of a term, or a field of the batch."""
        for k, of_term in enumerate(weights):
            if name == weight_name(k):
                return of_term
        return batch.per_token_field(name)

    def __add__(self, other: object) -> Loss:
        if isinstance(other, numbers.Real) and other == 0:  # the start of sum([...])
            return self
        if not isinstance(other, Loss):
            return NotImplemented
        return Loss._of(self.terms + other.terms, self._fault or other._fault)

    __radd__ = __add__

    def __sub__(self, other: object) -> Loss:
        return self + -1.0 * other if isinstance(other, Loss) else NotImplemented

    def __neg__(self) -> Loss:
        return -1.0 * self

    def __mul__(self, coefficient: object) -> Loss:
        if isinstance(coefficient, Tensor):
            if coefficient.dim() or coefficient.requires_grad:
                raise ValueError(
                    "coefficient of a loss must be a number or a 0-dim tensor without a gradient, got a tensor of "
                    f"shape {tuple(coefficient.shape)}, requires_grad={coefficient.requires_grad}"
                )
        elif not isinstance(coefficient, numbers.Real):
            return NotImplemented
        factor: Any = coefficient
        terms = tuple(replace(term, coefficient=factor * term.coefficient) for term in self.terms)
        return Loss._of(terms, self._fault)

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loss) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(self.terms)

    def __repr__(self) -> str:
        return " + ".join(map(written, self.terms))


def _check_objective(objective: object) -> None:
    if not callable(objective):
        raise TypeError(f"objective must be callable, got {objective!r} ({type(objective).__name__})")
    if getattr(objective, "__module__", None) == f"{__package__}.recipes":
        raise TypeError(
            f"objective must be an objective, got the recipe {name_of(objective)}, which makes a loss itself"
        )
    if isinstance(objective, type) and issubclass(objective, Objective):
        raise TypeError(f"objective must be made first, as in {objective.__name__}(), got the class")
    if scope_of(objective) not in SCOPES:
        raise ValueError(
            f"scope must be one of {', '.join(SCOPES)}, got {scope_of(objective)!r} of {name_of(objective)}"
        )


def _tensor(params: tuple[float, ...]) -> Tensor:
    return torch.tensor(params, dtype=torch.float64, device="cpu")


def _compiled(params: tuple[float, ...], device: torch.device) -> Tensor:
    """Parameters of a loss that is made inside a compiled function, where a coefficient may be a variable."""
    one = torch.ones((), dtype=torch.float64, device=device)
    # Multiplications by a tensor, since torch.compile would compile again for each new number in a list.
    return torch.stack([one * p for p in params])


# Cached: a CUDA graph cannot record a copy from pageable memory, and a tensor that it recorded must stay alive.
@lru_cache(maxsize=4096)
def _on_device(params: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return _rounded(_tensor(params), dtype).to(device)


def _rounded(params: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 parameters, rounded to the dtype of the rows."""
    return params if dtype == torch.float64 else params.float().double()
