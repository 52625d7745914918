"""Tracing and differentiation: programs against PyTorch's autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import huber_loss, logsigmoid, softplus

import unirl_kernels as uk
from tests.runners import Runner
from unirl_kernels.program import MAX_PARAMS, Op, Program, Traced, evaluate, trace, weight_name
from unirl_kernels.program.functions import FUNCTIONS

EVERY_FUNCTION = {
    "abs": lambda x, y: abs(x) + x.abs(),
    "add": lambda x, y: x + y + 2 + (3 + x),
    "bitwise_and": lambda x, y: torch.where((x > 0) & (y > 0), x, y * y),
    "bitwise_not": lambda x, y: torch.where(~(x > 0), x, y * y),
    "bitwise_or": lambda x, y: torch.where((x > 0) | (y > 0), x, y * y),
    "clamp": lambda x, y: torch.clamp(x, -0.5, 0.5) * y,
    "clamp_max": lambda x, y: x.clamp(max=0.3) + torch.clamp_max(y, 0.1),
    "clamp_min": lambda x, y: x.clamp(min=-0.3) + x.clamp_min(0.2),
    "clip": lambda x, y: torch.clip(x, -1, 1) + torch.clip(x, y - 1, y + 0.5) + torch.clip(x, min=0.2 * y, max=0.1 * x),
    "detach": lambda x, y: x.detach() * y,
    "div": lambda x, y: x / (y.square() + 1) + x / 3 + 1 / (x.square() + 2),
    "eq": lambda x, y: torch.where(x == y, x, 2 * y),
    "exp": lambda x, y: torch.exp(x - y),
    "expm1": lambda x, y: torch.expm1(x * 0.1) - y.expm1(),
    "float": lambda x, y: (x > 0).float() * y + 1 - (y > 0).float(),
    "ge": lambda x, y: torch.where(x >= y, x, y * 3),
    "gt": lambda x, y: torch.where(x > 0, x * x, y),
    "le": lambda x, y: torch.where(x <= y, x, 3.0),
    "log": lambda x, y: torch.log(x.abs() + 1),
    "log1p": lambda x, y: torch.log1p(x * x),
    "log_sigmoid": lambda x, y: logsigmoid(x * 3 - y),
    "logical_and": lambda x, y: torch.where(torch.logical_and(x, y > 0), x, y * y),
    "logical_not": lambda x, y: torch.where(torch.logical_not(x), x, torch.where((x > 0).logical_not(), 3 * x, y)),
    "logical_or": lambda x, y: torch.where(torch.logical_or(x.clamp(max=0), y > 0), x, y * y),
    "logsigmoid": lambda x, y: -logsigmoid(-x),
    "lt": lambda x, y: torch.where(x < y, x, -y),
    "max": lambda x, y: torch.max(x, y),
    "maximum": lambda x, y: torch.maximum(x * 2, y),
    "min": lambda x, y: torch.min(x, y),
    "minimum": lambda x, y: torch.minimum(x * y, x),
    "mul": lambda x, y: x * y * 0.5,
    "ne": lambda x, y: torch.where(x != y, x, y),
    "neg": lambda x, y: -x + torch.neg(y),
    "ones_like": lambda x, y: torch.ones_like(x) * y + x,
    "pow": lambda x, y: (
        x**3 + (x.abs() + 1) ** -2 + (y * y + 1) ** 0.5 + (x.abs() + 0.3) ** 1.5 + (y * y + 0.3) ** -0.7
    ),
    "reciprocal": lambda x, y: torch.reciprocal(x * x + 1),
    "relu": lambda x, y: torch.relu(x) + y,
    "rsub": lambda x, y: 1 - x,
    "sigmoid": lambda x, y: torch.sigmoid(3 * x) * y,
    "sign": lambda x, y: torch.sign(x) * x * y,
    "softplus": lambda x, y: softplus(x) - softplus(y, threshold=0.3) + softplus(30 * x),
    "sqrt": lambda x, y: torch.sqrt(x * x + 0.5),
    "square": lambda x, y: torch.square(x) - y.square(),
    "sub": lambda x, y: x - y - 1,
    "tanh": lambda x, y: torch.tanh(x * y),
    "true_divide": lambda x, y: torch.true_divide(x, 2.5),
    "where": lambda x, y: torch.where(x.detach() > 0.1, x, 0.0) + 3 * y.where(x > 0, 0.5 * x),
    "zeros_like": lambda x, y: torch.zeros_like(x) + x,
    "rdiv": lambda x, y: 2 / (1 + x * x),
    "bool": lambda x, y: torch.where(x.bool(), y, x) + torch.where((x - 0.5).bool(), y, 2 * x),
    "double": lambda x, y: (x > 0).double() * y + x.double(),
    "full_like": lambda x, y: torch.full_like(x, 2.5) * y,
    "huber_loss": lambda x, y: huber_loss(x, 2 * y, reduction="none", delta=0.7) + huber_loss(x, y, reduction="none"),
    "isfinite": lambda x, y: torch.where(torch.isfinite(torch.log(x.detach())), x, y),
    "isinf": lambda x, y: torch.where(torch.isinf(torch.log(x.detach().clamp(min=0))), x, y),
    "isnan": lambda x, y: torch.where(torch.sqrt(x.detach()).isnan(), x, y),
    "lerp": lambda x, y: torch.lerp(x, y * y, 0.3),
    "logaddexp": lambda x, y: torch.logaddexp(2 * x, y) + torch.logaddexp(x, x),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 1.5) + torch.masked_fill(y, x > y, -2),
    "nan_to_num": lambda x, y: torch.nan_to_num(torch.log(x.detach()), nan=0.5, neginf=-3) * y,
    "rsqrt": lambda x, y: torch.rsqrt(x * x + 1) * y,
    "to": lambda x, y: (x > 0).to(x.dtype) * y + x.to(torch.float64),
    "type_as": lambda x, y: (x > 0).type_as(x) * y,
}


def outputs_of(traced: Traced, logp: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
    """What a program that reads no field gives where its term weighs 1."""
    assert set(traced.fields) <= {weight_name(0)}
    fields = torch.ones(len(traced.fields), *logp.shape, dtype=logp.dtype)
    stats = (logp, entropy, torch.zeros_like(logp))
    return evaluate(traced.program, stats, fields, torch.tensor(traced.params_of(logp.dtype), dtype=torch.float64))


def compare(f: object, points: Tensor) -> None:
    """Value and both derivatives of f(logp, entropy), traced and by autograd, in fp64."""
    traced = trace([lambda t: f(t.logp, t.entropy)])
    x, y = (p.clone().requires_grad_() for p in points)
    value = f(x, y) + 0 * (x + y)
    expected = (value, *torch.autograd.grad(value.sum(), (x, y)))
    loss, d_logp, d_entropy, d_lse = outputs_of(traced, x.detach(), y.detach())
    for got, want in zip((loss, d_logp, d_entropy), expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert not d_lse.any()


@pytest.mark.parametrize("name", EVERY_FUNCTION)
def test_every_function(name: str) -> None:
    ties = torch.tensor([[0.0, 0.5, -0.5, 1.0, -1.0, 0.1], [0.0, 0.5, 0.5, 1.0, -1.0, 0.1]], dtype=torch.float64)
    away_from_zero = ties.clone()
    away_from_zero[:, 0] = 0.25
    compare(EVERY_FUNCTION[name], torch.randn(2, 50, dtype=torch.float64))
    compare(EVERY_FUNCTION[name], away_from_zero if name in ("abs",) else ties)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x.where(condition=y > 0, other=y * y),
        lambda x, y: torch.tensor(0.25, dtype=torch.float64).where(x > 0, x * y),
        lambda x, y: torch.tensor(0.25, dtype=torch.float64) - torch.rsub(x.sub(y), y) / x.square().add(1),
    ],
)
def test_methods_take_their_operands_in_their_own_order(f: object) -> None:
    compare(f, torch.randn(2, 50, dtype=torch.float64))


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: (x > 0) * y + (x > y) * 2 + (x > 0) * (y > 0) * x,
        lambda x, y: torch.where(torch.logical_or(torch.sign(x) - 1, x > 9), x, y),
        lambda x, y: torch.where(torch.where(x > 0, y > 0, x > -1) & True, x, y * y),
        lambda x, y: torch.where(True & (torch.maximum(x > 0, y > 0).detach() | False), x, y * y),
        lambda x, y: torch.where(~((x > 0) * (y > 0)), x, y * y) + (x > 0) / 2,
    ],
)
def test_truth_values_are_those_of_pytorch(f: object) -> None:
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
    compare(f, torch.cartesian_prod(values, values).T.contiguous())


def test_relu_of_nan_is_nan() -> None:
    nan = torch.tensor([float("nan")])
    assert outputs_of(trace([lambda t: torch.relu(t.logp)]), nan, nan)[0].isnan()


@pytest.mark.parametrize("f", [torch.nan_to_num, lambda x: x.nan_to_num(posinf=3), lambda x: 2 - x.nan_to_num(0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_infinities_become_the_limits_of_the_dtype(dtype: torch.dtype, f: Callable[[Tensor], Tensor]) -> None:
    points = torch.tensor([math.inf, -math.inf, math.nan, 1.5], dtype=dtype)
    value, *_ = outputs_of(trace([lambda t: f(t.logp)]), points, torch.zeros_like(points))
    assert torch.equal(value, f(points))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_limits_are_those_of_the_rows(dtype: torch.dtype, runner: Runner) -> None:
    """Whether a gradient is wanted or not, which says whether a program or plain PyTorch computes the loss."""
    runner.need(dtype)
    logits = torch.tensor([[[0.0, -math.inf]]], dtype=dtype, device=runner.device)
    batch = uk.Batch(torch.tensor([[1]], device=runner.device))
    loss = uk.Loss(lambda t: 0.5 * torch.nan_to_num(t.logp), uk.TokenMean())
    for leaf in (logits, logits.clone().requires_grad_()):
        assert uk.fused_loss(leaf, batch, loss, plan=runner.plan()).loss.item() == -0.5 * torch.finfo(dtype).max


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_limits_are_those_of_the_rows_when_compiled(dtype: torch.dtype) -> None:
    loss = uk.Loss(lambda t: 0.5 * torch.nan_to_num(t.logp), uk.TokenMean())
    batch = uk.Batch(torch.tensor([[1]]))
    compiled = torch.compile(lambda x: uk.fused_loss(x, batch, loss).loss, backend="aot_eager", fullgraph=True)
    leaf = torch.tensor([[[0.0, -math.inf]]], dtype=dtype, requires_grad=True)
    assert compiled(leaf).item() == -0.5 * torch.finfo(dtype).max


@pytest.mark.parametrize("f", [torch.minimum, torch.maximum, lambda x, y: torch.minimum(x * 2, 0.5 - y)])
def test_an_extremum_of_nan_passes_both_gradients(f: object) -> None:
    """As PyTorch's backward pass does, which takes none of them for the larger one."""
    nan = float("nan")
    compare(f, torch.tensor([[nan, 1.0, nan, 1.0, 2.0], [1.0, nan, nan, 1.0, -1.0]], dtype=torch.float64))


def test_equal_bounds_of_a_clamp_have_the_upper_ones_gradient() -> None:
    """That of the upper bound above it, none below it."""
    points = torch.tensor([[-1.0, 0.0, 2.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    compare(lambda x, y: torch.clamp(x, y, y), points)
    compare(lambda x, y: torch.clamp(x, y * y, 0.5 * y), points)


def test_a_branch_that_where_leaves_has_no_gradient() -> None:
    """Where autograd gives NaN, 0 times the infinite slope of a logarithm: the one stated difference."""
    x, y = torch.tensor([0.0, 2.0]).double().requires_grad_(), torch.tensor([-1.0, 1.0]).double()
    (of_autograd,) = torch.autograd.grad(torch.where(y > 0, torch.log(x), 0.0).sum(), x)
    traced = trace([lambda t: torch.where(t.entropy > 0, torch.log(t.logp), 0.0)])
    _, d_logp, _, _ = outputs_of(traced, x.detach(), y)
    assert of_autograd.isnan().tolist() == [True, False]
    assert d_logp.tolist() == [0.0, 0.5]


def test_the_table_of_functions_is_tested() -> None:
    assert set(EVERY_FUNCTION) == set(FUNCTIONS)


@pytest.mark.parametrize(
    "kept",
    # To clamp its bound is inside: nothing is selected away there, so the points stay off it.
    [torch.relu, lambda x: torch.where(x > 0, x, 0.0), lambda x: (x - 1e-3).clamp(min=0)],
)
@pytest.mark.parametrize(
    "steep",
    [
        torch.sqrt,
        lambda x: torch.sqrt(torch.sqrt(x)),
        lambda x: x**0.5 * 2,
        lambda x: torch.log(x).clamp(min=-3),
        lambda x: torch.log1p(x - 1).exp(),
        lambda x: torch.exp(-1 / x),
        lambda x: torch.clamp(2 / x, max=4),
        lambda x: torch.tanh(x**-2),
        lambda x: torch.tanh((x + 1) / x),
        lambda x: torch.tanh(x.reciprocal()),
    ],
)
def test_an_infinite_slope_of_what_was_selected_away_is_zero(steep: object, kept: object) -> None:
    """PyTorch selects in its backward pass: sqrt(relu(x)) has the gradient 0 at x <= 0, not inf * 0."""
    points = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 2.0], [1.0, 2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
    compare(lambda x, y: steep(kept(x)), points)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: torch.exp((1000 * x).clamp(max=800)),
        lambda x, y: torch.expm1(torch.where(x > 1, 800.0, x)),
        lambda x, y: torch.exp((x + torch.log(y).detach()).clamp(-20, 20)),
        lambda x, y: torch.log(y) * x.clamp(max=1),
        lambda x, y: torch.tanh(torch.log(y)) * torch.relu(-x),
        lambda x, y: (1000 * torch.relu(x).exp() ** 400) ** 2 * torch.sigmoid(y),
    ],
)
def test_an_overflow_of_what_was_selected_away_has_no_slope(f: object) -> None:
    """A value that is infinite or NaN still has the gradient that PyTorch gives it."""
    points = torch.tensor([[-1.0, -0.5, 0.25, 0.5, 2.0, 2.0], [1.0, 2.0, -1.0, 0.5, 0.25, -1.0]], dtype=torch.float64)
    compare(f, points)


def test_the_guard_of_steep_slopes_costs_the_recipes_nothing() -> None:
    """Instructions with all derivatives; division by a parameter and slopes along an input need no guard either."""
    made = {"sft": uk.sft(), "rft": uk.rft(), "ppo": uk.ppo(), "grpo": uk.grpo()}
    lengths = {name: len(loss.traced().program.instructions) for name, loss in made.items()}
    # Of these, four weigh loss and coefficient, and two make NaN logits visible.
    assert lengths == {"sft": 7, "rft": 8, "ppo": 33, "grpo": 46}
    for f in (lambda t: torch.sqrt(t.logp), lambda t: torch.exp(t.logp) / 3, lambda t: 1 / t.logp):
        assert [i.op for i in trace([f]).program.instructions].count(Op.WHERE) <= 2  # the weights'


EXPRESSIONS = st.recursive(
    st.one_of(
        st.just(lambda x, y: x),
        st.just(lambda x, y: y),
        st.floats(-2, 2).map(lambda c: lambda x, y: torch.ones_like(x) * c),
    ),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "minimum", "maximum"]), inner, inner).map(
            lambda t: lambda x, y: getattr(torch, t[0])(t[1](x, y), t[2](x, y))
        ),
        st.tuples(st.sampled_from(["tanh", "sigmoid", "neg", "square"]), inner).map(
            lambda t: lambda x, y: getattr(torch, t[0])(t[1](x, y))
        ),
        st.tuples(inner, inner, inner).map(lambda t: lambda x, y: torch.where(t[0](x, y) > 0, t[1](x, y), t[2](x, y))),
        inner.map(lambda f: lambda x, y: torch.clamp(torch.tanh(f(x, y)), -0.5, 0.7)),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS)
def test_any_expression(f: object) -> None:
    torch.manual_seed(1)
    compare(f, torch.randn(2, 20, dtype=torch.float64))


def test_new_scalars_need_no_new_program() -> None:
    """The program does not depend on the values of the objective's scalars: no kernel is compiled again."""
    assert uk.grpo(0.2, 0.04).traced().program == uk.grpo(0.3, 0.5).traced().program
    assert uk.grpo(0.2, 0.04).traced().params != uk.grpo(0.3, 0.5).traced().params
    assert uk.ppo().traced().program != uk.sft().traced().program


def test_equal_integers_share_a_parameter_and_equal_floats_do_not() -> None:
    assert len(trace([lambda t: (t.logp + 3) * (t.entropy + 3)]).graph.params) == 1
    assert len(trace([lambda t: (t.logp + 0.3) * (t.entropy + 0.3)]).graph.params) == 2


def test_text_round_trip() -> None:
    for loss in (uk.sft(), uk.ppo(), uk.grpo()):
        program = loss.traced().program
        assert Program.parse(program.text) == program
    with pytest.raises(ValueError, match="program must hold"):
        Program.parse("0 0 1 -1 -1 -1 -1")


def test_reads_only_what_the_loss_needs() -> None:
    weight = weight_name(0)
    assert set(uk.sft().traced().fields) == {weight}
    assert set(uk.rft().traced().fields) == {weight, "advantage"}
    assert set(uk.grpo().traced().fields) == {weight, "old_logp", "ref_logp", "advantage"}
    assert set(uk.grpo().traced(on_policy=True).fields) == {weight, "ref_logp", "advantage"}
    assert set(uk.grpo(beta=None).traced().fields) == {weight, "old_logp", "advantage"}
    assert set((uk.sft() + uk.rft()).traced().fields) == {weight, weight_name(1), "advantage"}


def test_simple_derivatives_are_simple() -> None:
    """SFT's coefficient is the constant 1, RFT's the advantage: no instruction is left over."""
    weighted = [Op.MUL, Op.WHERE]
    visible = [Op.SUB, Op.ADD]  # of NaN logits
    made = sorted(i.op for i in uk.sft().traced().program.instructions)
    assert len(made) <= len([Op.NEG, *weighted, *weighted, *visible])
    assert len(uk.rft().traced().program.instructions) <= 3 + 6


def test_limits_are_an_error_that_names_the_way_out() -> None:
    def long(t: object) -> object:
        value = t.logp
        for k in range(MAX_PARAMS + 1):
            value = value * (1 + k / 10)
        return value

    with pytest.raises(uk.UnsupportedOperation, match=r"one-pass kernels take .* Plan\(kernel='composed'\)"):
        uk.Loss(long).traced()


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (lambda t: t.logp * torch.ones(3), r"tensor of shape \(3,\)"),
        (lambda t: t.logp + "x", "operand of type str"),
        (lambda t: softplus(t.logp, beta=2), "softplus with beta != 1"),
        (lambda t: t.logp.max(0), "maximum with a plain number"),
        (lambda t: torch.min(t.logp, 0), "minimum with a plain number"),
        (lambda t: t.logp.maximum(0.5), "maximum with a plain number"),
        (lambda t: ((t.logp > 0) + (t.entropy > 0)) * t.logp, r"calls add on truth values: use \.float\(\)"),
        (lambda t: ((t.logp > 0) + True) * t.logp, "calls add on truth values"),
        (lambda t: ((t.logp > 0) - (t.entropy > 0)) * t.logp, "calls sub on truth values"),
        (lambda t: t.logp - (t.entropy > 0), "calls sub on truth values"),
        (lambda t: -(t.logp > 0) * t.logp, "calls neg on truth values"),
        (lambda t: (1 - (t.logp > 0)) * t.logp, "calls rsub on truth values"),
        (lambda t: (t.logp & (t.logp > 0)) * t.logp, "&, | or ~ on what is not a truth value"),
        (lambda t: ~t.logp, "&, | or ~ on what is not a truth value"),
        (lambda t: torch.where(t.logp, t.logp, 0.0), "chooses by what is not a truth value"),
        (lambda t: t.logp**t.entropy, "power that varies by token"),
        (lambda t: list(t.logp), "iterates over tokens"),
        (lambda t: t.logp[0], "indexes tokens"),
        (lambda t: t.logp * len(t.logp), "number of tokens"),
        (lambda t: t.logp.undefined_thing(), "uses .undefined_thing"),
        (lambda t: t.logp * t.advantage.max(), "calls max in a form"),
        (lambda t: t.logp * t.advantage.exp(t.logp), r"calls exp in a form .*\(operands must number 1, not 2\)"),
        (lambda t: undefined_name * t.logp, "cannot be traced"),  # noqa: F821
    ],
)
def test_what_cannot_be_traced_says_why(objective: object, words: str) -> None:
    with pytest.raises(uk.UnsupportedOperation, match=words):
        trace([objective])
