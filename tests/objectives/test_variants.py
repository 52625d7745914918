"""The table of published objectives, each against its formula in fp64: backends, layouts, linear heads, chunk sizes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.objectives.variants.data import AS_MANY, Answer, Data, Oracle, answers, make
from tests.objectives.variants.rows import Row
from tests.objectives.variants.table import ABSENT, LAST, ROWS
from unirl_kernels import objectives as uo
from unirl_kernels.backends import COMPOSED, load
from unirl_kernels.objectives.arguments import Parameters
from unirl_kernels.program import MAX_FIELDS, MAX_INSTRUCTIONS, MAX_PARAMS
from unirl_kernels.testing.budgets import condition_of, violations

NATIVE = ("cpu", "eager")
CHUNKS = (3, 7, None)
"""Tokens per chunk: one that few sequences fit, one that every pair fits, all in one."""
TINY = (2, 1)
"""Triton's interpreter takes tens of milliseconds per row."""


@dataclass(frozen=True)
class Result:
    loss: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Expected:
    """By the row's oracle: in fp64, and as plain PyTorch in fp32, which sets the budget."""

    truth: Result
    plain: Result
    size: float

    def check(self, got: Result, what: str) -> None:
        condition = self.size * condition_of(self.truth.loss)
        problems = violations(got.loss.view(1), self.plain.loss.view(1), self.truth.loss.view(1), condition=condition)
        assert not problems, f"{what}: loss {got.loss.item()} against {self.truth.loss.item()}: {problems}"
        for x, plain, truth in zip(got.gradients, self.plain.gradients, self.truth.gradients, strict=False):
            problems = violations(x, plain, truth, condition=self.size)
            assert not problems, f"{what}: gradient {problems}"


def by_oracle(oracle: Oracle, seen: list[Answer], leaves: tuple[Tensor, ...]) -> Result:
    value = torch.as_tensor(oracle(seen), dtype=leaves[0].dtype)
    if not value.requires_grad:
        return Result(value, tuple(map(torch.zeros_like, leaves)))
    return Result(value.detach(), torch.autograd.grad(value, leaves, materialize_grads=True))


def of_logits(row: Row, data: Data) -> Expected:
    def result(dtype: torch.dtype) -> Result:
        logits = data.logits.to(dtype).requires_grad_()
        return by_oracle(row.oracle, answers(data, logits, row.fields.split()), (logits,))

    return Expected(result(torch.float64), result(torch.float32), size_of(data))


def of_head(row: Row, data: Data) -> Expected:
    def result(dtype: torch.dtype) -> Result:
        hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (data.hidden, data.weight))
        return by_oracle(row.oracle, answers(data, hidden @ weight.t(), row.fields.split()), (hidden, weight))

    return Expected(result(torch.float64), result(torch.float32), size_of(data))


@lru_cache(maxsize=8)
def data_of(lengths: tuple[int, ...]) -> Data:
    return make(lengths)


def size_of(data: Data) -> float:
    """What rounding of logits is relative to."""
    return max(1.0, torch.logsumexp(data.logits.double(), -1).abs().max().item())


def batch_of(row: Row, data: Data, packed: bool) -> uk.Batch:
    batch = data.batch(row.fields.split(), packed)
    return replace(batch, pairs="interleaved") if row.interleaved else batch


def fused(data: Data, batch: uk.Batch, loss: uk.Loss, plan: uk.Plan, wanted: bool = True) -> Result:
    logits = data.laid_out(data.logits, batch.cu_seqlens is not None, float("nan")).requires_grad_(wanted)
    out = uk.fused_loss(logits, batch, loss, plan=plan)
    if not wanted:
        return Result(out.loss, ())
    (d_logits,) = torch.autograd.grad(out.loss, logits)
    assert not d_logits[~batch.valid].any(), "an ignored token has a gradient"
    return Result(out.loss.detach(), (d_logits[batch.valid],))


def fused_head(data: Data, batch: uk.Batch, loss: uk.Loss, plan: uk.Plan, wanted: bool = True) -> Result:
    hidden = data.laid_out(data.hidden, batch.cu_seqlens is not None, float("nan")).requires_grad_(wanted)
    weight = data.weight.clone().requires_grad_(wanted)
    out = uk.fused_linear_loss(hidden, weight, batch, loss, plan=plan)
    if not wanted:
        return Result(out.loss, ())
    d_hidden, d_weight = torch.autograd.grad(out.loss, (hidden, weight))
    return Result(out.loss.detach(), (d_hidden[batch.valid], d_weight))


def plans_of(loss: uk.Loss) -> Iterator[uk.Plan]:
    """Every kernel of the native backends that the loss runs in."""
    for backend in NATIVE:
        kernels = load(backend).KERNELS if loss.scope == "token" else ()
        yield from (uk.Plan(backend, kernel) for kernel in (*kernels, COMPOSED))


def chunk(data: Data, tokens: int | None, backend: str = "cpu") -> uk.Plan:
    if tokens is None:
        return uk.Plan(backend)
    row_bytes = load(backend).matmuls(data.weight, torch.float32).row_bytes
    return uk.Plan(backend, max_chunk_bytes=tokens * row_bytes)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_logits(row: Row) -> None:
    data, loss = data_of(row.lengths), row.loss()
    expected = of_logits(row, data)
    for packed in (False, True):
        batch = batch_of(row, data, packed)
        for plan in plans_of(loss):
            for wanted in (True, False):
                expected.check(fused(data, batch, loss, plan, wanted), f"{plan}, packed {packed}, gradient {wanted}")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_linear_head(row: Row) -> None:
    data, loss = data_of(row.lengths), row.loss()
    expected = of_head(row, data)
    for packed in (False, True):
        batch = batch_of(row, data, packed)
        for tokens in CHUNKS:
            expected.check(fused_head(data, batch, loss, chunk(data, tokens)), f"{tokens} tokens, packed {packed}")
        expected.check(fused_head(data, batch, loss, uk.Plan(), wanted=False), f"packed {packed}, no gradient")
    expected.check(fused_head(data, batch, loss, uk.Plan("eager")), "eager")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_as_many_tokens_as_sequences(row: Row) -> None:
    """Shapes do not tell there whether a field has a value per sequence or per token."""
    data, loss = data_of(AS_MANY), row.loss()
    padded, packed = (batch_of(row, data, packed) for packed in (False, True))
    assert packed.target.shape == (packed.n_sequences,)
    size = 32 * torch.finfo(torch.float32).eps * size_of(data)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=size, equal_nan=True)
    for plan in plans_of(loss):
        got, expected = (fused(data, batch, loss, plan) for batch in (packed, padded))
        close((got.loss, *got.gradients), (expected.loss, *expected.gradients))
    for tokens in CHUNKS:
        got, expected = (fused_head(data, batch, loss, chunk(data, tokens)) for batch in (packed, padded))
        close((got.loss, *got.gradients), (expected.loss, *expected.gradients))


def programs() -> list[Row]:
    """Rows of token scope, one for each program: others differ in weights alone."""
    found = {row.loss().traced().text: row for row in reversed(ROWS) if row.loss().scope == "token"}
    return list(reversed(found.values()))


@pytest.mark.parametrize("row", programs(), ids=str)
def test_triton(row: Row) -> None:
    data = data_of(TINY)
    batch, expected = batch_of(row, data, True), of_logits(row, data)
    expected.check(fused(data, batch, row.loss(), uk.Plan("triton", "two_sweep")), "triton")


def test_the_table_is_whole() -> None:
    assert {row.number for row in ROWS} | set(ABSENT) == set(range(1, LAST + 1))
    assert not {row.number for row in ROWS} & set(ABSENT)


def test_every_token_objective_runs_in_one_pass() -> None:
    for row in ROWS:
        loss = row.loss()
        if loss.scope == "token":
            loss.traced(), loss.traced(on_policy=True)


def parts(x: object) -> Iterator[Parameters]:
    """An objective and what it is made of."""
    if isinstance(x, Parameters):
        yield x
        for field in fields(x):
            yield from parts(getattr(x, field.name))


def test_every_objective_stands_in_the_table() -> None:
    used = {type(x).__name__ for row in ROWS for term in row.loss().terms for x in parts(term.objective)}
    public = {name for name in uo.__all__ if isinstance(x := getattr(uo, name), type) and issubclass(x, Parameters)}
    assert public - {"Objective"} == used


def test_objectives_are_short() -> None:
    """What computes: methods without their docstrings, metrics aside."""
    for name in uo.__all__:
        cls = getattr(uo, name)
        if not (isinstance(cls, type) and issubclass(cls, Parameters)):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        methods = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name != "metrics"]
        lines = sum(x.end_lineno - x.lineno + 1 - documentation(x) for x in methods)
        assert lines <= 15, f"{name}: {lines} lines"


def documentation(function: ast.FunctionDef) -> int:
    first = function.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.end_lineno - first.lineno + 1 if is_text else 0


def test_a_field_that_learns_gets_its_gradient() -> None:
    """FlowRL's log Z, of the model's own head: on logits and on linear heads."""
    (row,) = (row for row in ROWS if row.name == "flowrl")
    data = data_of(row.lengths)
    log_z = data.of_sequences["log_z"].clone().requires_grad_()
    batch = batch_of(row, data, True)
    batch = replace(batch, fields=dict(batch.fields) | {"log_z": log_z})
    seen = answers(data, data.logits.double(), row.fields.split())
    for answer, z in zip(seen, log_z.double(), strict=True):
        answer.fields["log_z"] = z
    (expected,) = torch.autograd.grad(row.oracle(seen), log_z)
    logits, hidden = (data.laid_out(x, True, 0.0).requires_grad_() for x in (data.logits, data.hidden))
    for out in (
        uk.fused_loss(logits, batch, row.loss()),
        uk.fused_linear_loss(hidden, data.weight, batch, row.loss(), plan=chunk(data, 3)),
    ):
        (got,) = torch.autograd.grad(out.loss, log_z)
        assert not violations(got, expected, expected.double(), condition=size_of(data))


def test_kernels_take_more_than_twice_the_longest_of_the_table() -> None:
    made = [row.loss() for row in ROWS]
    programs = [loss.traced().program for loss in made if loss.scope == "token"]
    assert len(programs) > 90
    assert 2 * max(len(p.instructions) for p in programs) <= MAX_INSTRUCTIONS
    assert 2 * max(p.n_params for p in programs) <= MAX_PARAMS
    assert 2 * max(p.n_fields for p in programs) <= MAX_FIELDS
