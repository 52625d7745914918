"""Traces objectives: runs each once on symbols and records what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unirl_kernels.program.derive import assemble
from unirl_kernels.program.graph import Expr, Graph
from unirl_kernels.program.ir import STATISTICS, Program
from unirl_kernels.program.operands import FLOAT64, UnsupportedOperation, expr_of
from unirl_kernels.program.symbols import Symbol

WAY_OUT = "Run it with Plan(kernel='composed'): statistics first, then the objective as plain PyTorch under autograd"

Objective = Callable[[Any], Any]

NUMBERS = frozenset({"advantage", "old_logp", "ref_logp"})
"""Fields that are numbers; other fields may be truth values."""


@dataclass(frozen=True)
class Traced:
    """The result of tracing.

    Args:
        program: the weighted loss and its derivatives, shared by all values of the objectives' scalars.
        params: values of the program's parameters, for rows and fields in fp32; see ``params_of``.
        text: the program in the form that operators take.
        fields: names of the fields that the program reads, in their order. The weight of term k is
            ``weight_name(k)``.
        graph: the expressions it was made from.
        terms: each term's unweighted loss.
        demands: what the dtypes of a batch's fields must be; see ``Graph.demands``.
    """

    program: Program
    params: tuple[float, ...]
    text: str
    fields: tuple[str, ...]
    graph: Graph
    terms: tuple[Expr, ...]
    demands: tuple[tuple[str, tuple[str, ...], str], ...]

    def params_of(self, dtype: torch.dtype, wide: Collection[str] = ()) -> tuple[float, ...]:
        """The parameters for rows in a dtype: ``nan_to_num`` replaces infinities by the limits of its argument's dtype.

        Args:
            dtype: float32 or float64.
            wide: names of the fields that are float64. Their limit is inf in rows of float32.
        """
        params = list(self.params)
        for inputs, limit in self.graph.limits.items():
            if dtype == torch.float64:
                params[int(limit.value)] = torch.finfo(dtype).max
            elif not inputs.isdisjoint({FLOAT64, *wide}):
                params[int(limit.value)] = math.inf
        return tuple(params)


def weight_name(term: int) -> str:
    """Name of the field with a term's weight. It is not an identifier, so no user's field can have this name."""
    return f"weight {term}"


def trace(objectives: Sequence[Objective], reserved: frozenset[str] = frozenset(), on_policy: bool = False) -> Traced:
    """Record token-scope objectives, the terms of one loss, and differentiate their weighted sum.

    Args:
        objectives: called with symbols in place of tensors.
        reserved: attributes of the tokens that are not fields: those of objectives of a wider scope.
        on_policy: whether ``old_logp`` is the value of ``logp``, without its gradient.

    Raises:
        UnsupportedOperation: naming the objective, the operation, and the way out.
    """
    graph = Graph()
    tokens = SymbolicTokens(graph, reserved, on_policy)
    # Whatever mode the caller is in: what the objective itself turns off is what has no gradient.
    with torch.inference_mode(False), torch.enable_grad():
        terms = tuple(_recorded(graph, objective, tokens) for objective in objectives)
    weights = [weight_name(k) for k in range(len(terms))]
    try:
        program, fields, params = assemble(graph, terms, weights)
    except ValueError as error:
        names = " + ".join(name_of(objective) for objective in objectives)
        raise UnsupportedOperation(f"objective {names} is too long: {error}. {WAY_OUT}") from None
    return Traced(program, tuple(params), program.text, fields, graph, terms, tuple(graph.demands))


def _recorded(graph: Graph, objective: Objective, tokens: SymbolicTokens) -> Expr:
    try:
        return expr_of(graph, objective(tokens))
    except UnsupportedOperation as error:
        refused = error.args[0]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnsupportedOperation(f"objective {name_of(objective)} cannot be traced ({reason}). {WAY_OUT}") from error
    # Behind the handler instead of "from None", which torch.compile of torch 2.11 cannot follow.
    raise UnsupportedOperation(f"objective {name_of(objective)} {refused}. {WAY_OUT}")


def name_of(objective: Objective) -> str:
    """The objective's name, and where it was written if Python knows."""
    name = str(getattr(objective, "__name__", type(objective).__name__))
    function = objective if hasattr(objective, "__code__") else getattr(type(objective), "__call__", None)  # noqa: B004
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


class SymbolicTokens:
    """Stands in for the tokens while an objective is traced: every attribute is a statistic or a field."""

    def __init__(self, graph: Graph, reserved: frozenset[str], on_policy: bool) -> None:
        self._graph = graph
        self._reserved = reserved
        self._on_policy = on_policy

    def __getattr__(self, name: str) -> Symbol:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._reserved:
            raise UnsupportedOperation(
                f"uses t.{name}, which depends on more than one token: give it a scope of 'sequence', 'pair' or 'batch'"
            )
        if name == "old_logp" and self._on_policy:
            return Symbol(self._graph.detach(self._graph.input("logp")))
        if name in STATISTICS:
            return Symbol(self._graph.input(name))
        return Symbol(self._graph.input(name), False if name in NUMBERS else None, frozenset({name}))
