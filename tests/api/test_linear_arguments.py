"""Arguments that linear heads refuse, and the errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME
from tests.linear import PACKED, RAGGED, SEQUENCE_SCOPE, LinearHead, budget, given, leaves_of, make_head
from unirl_kernels.backends import load

D, V = 4, 7


def loss_of(hidden: Any, weight: Any, target: Any, bias: Any, plan: uk.Plan) -> Tensor:
    return uk.fused_linear_loss(hidden, weight, uk.Batch(target), uk.sft(), bias=bias, plan=plan).loss


def pair_loss_of(hidden: Any, weight: Any, target: Any, bias: Any, plan: uk.Plan) -> Tensor:
    batch = uk.Batch(target, ref_logp=torch.zeros(target.shape, device=target.device))
    return uk.fused_linear_loss(hidden, weight, batch, uk.dpo(), bias=bias, plan=plan).loss


def stats_of(hidden: Any, weight: Any, target: Any, bias: Any, plan: uk.Plan) -> Tensor:
    return uk.linear_token_stats(hidden, weight, target, bias=bias, plan=plan).logp


of_functions = pytest.mark.parametrize("function", [loss_of, pair_loss_of, stats_of])


def arguments(**changed: Any) -> dict[str, Any]:
    usual = {
        "hidden": torch.randn(2, 3, D),
        "weight": torch.randn(V, D),
        "target": torch.zeros(2, 3, dtype=torch.int64),
        "bias": None,
        "plan": uk.Plan(),
    }
    return usual | changed


FLOATS = "float32, bfloat16, float16, float64"
HALF, INTEGER, META = torch.zeros(V, D).half(), torch.zeros(V, D, dtype=torch.int64), torch.zeros(V, D, device="meta")

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "other D": (
        {"weight": torch.zeros(V, D + 1)},
        ValueError,
        f"weight must have shape (V, {D}) for hidden of D = {D}, got ({V}, {D + 1})",
    ),
    "weight [D, V]": (
        {"weight": torch.zeros(D, V)},
        ValueError,
        f"weight must have shape (V, {D}) for hidden of D = {D}, got ({D}, {V}); it looks transposed",
    ),
    "weight of one dimension": (
        {"weight": torch.zeros(D)},
        ValueError,
        f"weight must have shape (V, {D}) for hidden of D = {D}, got ({D},)",
    ),
    "no columns": (
        {"weight": torch.zeros(0, D)},
        ValueError,
        f"weight must have at least one row and column, got shape (0, {D})",
    ),
    "D = 0": (
        {"hidden": torch.zeros(2, 3, 0), "weight": torch.zeros(V, 0)},
        ValueError,
        f"weight must have at least one row and column, got shape ({V}, 0)",
    ),
    "bias of D": ({"bias": torch.zeros(D)}, ValueError, f"bias must have shape ({V},), got ({D},)"),
    "bias of two dimensions": ({"bias": torch.zeros(1, V)}, ValueError, f"bias must have shape ({V},), got (1, {V})"),
    "hidden of other positions": (
        {"hidden": torch.zeros(2, 4, D)},
        ValueError,
        f"hidden must have shape (2, 3, D), got (2, 4, {D})",
    ),
    "hidden flattened": ({"hidden": torch.zeros(6, D)}, ValueError, f"hidden must have shape (2, 3, D), got (6, {D})"),
    "hidden without D": ({"hidden": torch.zeros(2, 3)}, ValueError, "hidden must have shape (2, 3, D), got (2, 3)"),
    "hidden no tensor": ({"hidden": [[0.0]]}, TypeError, "hidden must be a tensor, got list"),
    "weight no tensor": ({"weight": 0}, TypeError, "weight must be a tensor, got int"),
    "weight a module": ({"weight": torch.nn.Linear(D, V)}, TypeError, "weight must be a tensor, got Linear"),
    "bias no tensor": ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    "integer weight": ({"weight": INTEGER}, TypeError, f"weight must be one of {FLOATS}, got int64"),
    "integer hidden": (
        {"hidden": torch.zeros(2, 3, D, dtype=torch.int32)},
        TypeError,
        f"hidden must be one of {FLOATS}, got int32",
    ),
    "weight of another dtype": (
        {"weight": HALF},
        ValueError,
        "weight must be float32 like hidden unless autocast is on, got float16",
    ),
    "bias of another dtype": (
        {"bias": torch.zeros(V).bfloat16()},
        ValueError,
        "bias must be float32 like hidden unless autocast is on, got bfloat16",
    ),
    "weight elsewhere": ({"weight": META}, ValueError, "weight must be on cpu like target, got meta"),
    "bias elsewhere": (
        {"bias": torch.zeros(V, device="meta")},
        ValueError,
        "bias must be on cpu like target, got meta",
    ),
    "hidden elsewhere": (
        {"hidden": torch.zeros(2, 3, D, device="meta")},
        ValueError,
        "hidden must be on cpu like target, got meta",
    ),
    "too little memory": (
        {"plan": uk.Plan("eager", max_chunk_bytes=4 * V - 1)},
        ValueError,
        f"max_chunk_bytes must hold the logits of one token, {4 * V} bytes, got {4 * V - 1}",
    ),
    "unknown backend": (
        {"plan": uk.Plan("gpu")},
        ValueError,
        "backend must be one of cpu, triton, cuda, eager, got 'gpu'",
    ),
    "backend of another device": (
        {"plan": uk.Plan("cuda")},
        RuntimeError,
        "backend 'cuda' cannot run on cpu: ",
    ),
}


def refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + ("" if message.endswith(": ") else "$")):
        call()


@of_functions
@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "_"))
def test_refused(case: str, function: Callable[..., Tensor]) -> None:
    """With and without a gradient: an evaluation refuses the same arguments as a training step."""
    changed, error, message = REFUSED[case]
    for gradient in (False, True):
        values = arguments(**changed)
        if gradient:
            values |= {
                name: x.detach().clone().requires_grad_()
                for name, x in values.items()
                if isinstance(x, Tensor) and x.is_floating_point()
            }
        refused(partial(function, **values), error, message)


@of_functions
def test_the_least_memory_that_is_enough(function: Callable[..., Tensor]) -> None:
    values = arguments()
    values["hidden"].requires_grad_()

    def within(backend: str, max_chunk_bytes: int | None) -> Tensor:
        return function(**values | {"plan": uk.Plan(backend, max_chunk_bytes=max_chunk_bytes)})

    for backend in ("cpu", "eager"):
        row = load(backend).matmuls(values["weight"], torch.float32).row_bytes
        torch.testing.assert_close(within(backend, row), within(backend, None))
        message = f"max_chunk_bytes must hold the logits of one token, {row} bytes, got {row - 1}"
        refused(partial(within, backend, row - 1), ValueError, message)
    for n in (0, -1):
        refused(partial(within, "cpu", n), ValueError, f"max_chunk_bytes must be positive, got {n}")


@of_functions
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_none_where_a_tensor_must_be(name: str, function: Callable[..., Tensor]) -> None:
    message = f"{name} must be a tensor, got NoneType"
    refused(lambda: function(**arguments(**{name: None})), TypeError, message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None], ids=str)
def test_target_of_another_dtype(dtype: torch.dtype | None) -> None:
    target = [[0, 0, 0]] if dtype is None else torch.zeros(2, 3, dtype=dtype)
    got = "list" if dtype is None else str(dtype).removeprefix("torch.")
    expected = f"target must be a tensor of int64, got {got}" if dtype is None else f"target must be int64, got {got}"
    refused(lambda: stats_of(**arguments(target=target)), TypeError, expected)


def test_autocast_does_not_mix_fp64() -> None:
    message = "weight must be float32 like hidden, got float64"
    with torch.autocast("cpu", torch.bfloat16):
        refused(lambda: loss_of(**arguments(weight=torch.zeros(V, D).double())), ValueError, message)


@of_functions
@pytest.mark.parametrize("outside", [V, -1, -101])
@pytest.mark.parametrize("tokens", [1, 3, 4, None])
@pytest.mark.parametrize("gradient", [False, True])
def test_target_outside_the_vocabulary(
    function: Callable[..., Tensor], outside: int, tokens: int | None, gradient: bool
) -> None:
    """The error gives its position in the caller's tensor, whatever the chunks and the ignored tokens before it."""
    target = torch.tensor([[0, uk.IGNORE, 1], [uk.IGNORE, 2, outside]])
    plan = uk.Plan("cpu", max_chunk_bytes=None if tokens is None else tokens * 4 * V)
    values = arguments(target=target, plan=plan)
    values["hidden"].requires_grad_(gradient)
    refused(
        lambda: function(**values),
        IndexError,
        f"target must lie in [0, {V}) or be {uk.IGNORE}, got {outside} at (1, 2)",
    )


def packed_with_a_bad_target(loss: Any, *frozen: str) -> tuple[LinearHead, list[Tensor | None]]:
    head = make_head(PACKED, loss)
    head.batch.target[4] = PACKED.vocab
    return head, leaves_of(head, frozen)


BAD_TARGET = f"target must lie in [0, {PACKED.vocab}) or be {uk.IGNORE}, got {PACKED.vocab} at (4,)"


def packed_loss(loss: Any, *frozen: str) -> Tensor:
    head, (hidden, weight, bias) = packed_with_a_bad_target(loss, *frozen)
    return uk.fused_linear_loss(hidden, weight, head.batch, loss.make(), bias=bias).loss


@pytest.mark.parametrize("loss", [BY_NAME["dpo"], SEQUENCE_SCOPE], ids=str)
def test_target_outside_the_vocabulary_packed(loss: Any) -> None:
    refused(lambda: packed_loss(loss), IndexError, BAD_TARGET)


@pytest.mark.parametrize("loss", [BY_NAME["grpo"], BY_NAME["dpo"]], ids=str)
def test_target_outside_the_vocabulary_packed_in_one_pass_or_without_a_gradient(loss: Any) -> None:
    frozen = () if loss.name == "grpo" else ("hidden", "weight", "bias")
    refused(lambda: packed_loss(loss, *frozen), IndexError, BAD_TARGET)


def test_target_of_statistics_outside_the_vocabulary_packed() -> None:
    head, (hidden, weight, bias) = packed_with_a_bad_target(BY_NAME["sft"])
    refused(lambda: uk.linear_token_stats(hidden, weight, head.batch.target, bias=bias), IndexError, BAD_TARGET)


@pytest.mark.parametrize("field", ["advantage", "ref_logp"])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kernel", [None, "composed"])
def test_a_field_that_the_objective_reads(field: str, gradient: bool, kernel: str | None) -> None:
    head = make_head(RAGGED, BY_NAME["grpo"])
    fields = {name: x for name, x in given(head.batch).items() if name != field}
    hidden = head.hidden.requires_grad_(gradient)
    refused(
        lambda: uk.fused_linear_loss(
            hidden, head.weight, uk.Batch(**fields), uk.grpo(), bias=head.bias, plan=uk.Plan(kernel=kernel)
        ),
        ValueError,
        f"the objective reads t.{field}, but batch.{field} is None",
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_kernels_that_do_not_fit(gradient: bool) -> None:
    head = make_head(RAGGED, BY_NAME["grpo"])
    hidden = head.hidden.requires_grad_(gradient)

    def call(loss: uk.Loss, kernel: str) -> object:
        return uk.fused_linear_loss(hidden, head.weight, head.batch, loss, bias=head.bias, plan=uk.Plan("cpu", kernel))

    refused(
        lambda: call(uk.dpo(), "rows"), ValueError, "kernel must be 'composed' for a pair-scope objective, got 'rows'"
    )
    refused(
        lambda: call(SEQUENCE_SCOPE.make(), "rows"),
        ValueError,
        "kernel must be 'composed' for a sequence-scope objective, got 'rows'",
    )
    refused(
        lambda: call(uk.grpo(), "cluster"),
        ValueError,
        "kernel of backend 'cpu' must be one of rows, composed, got 'cluster'",
    )


def test_an_unknown_kernel_of_statistics() -> None:
    refused(
        lambda: stats_of(**arguments(plan=uk.Plan("cpu", "nonsense"))),
        ValueError,
        "kernel of backend 'cpu' must be one of rows, composed, got 'nonsense'",
    )


def odd(tokens: int | None) -> tuple[LinearHead, uk.Plan]:
    head = make_head(RAGGED, BY_NAME["dpo"])
    batch = uk.Batch(head.batch.target[:3], ref_logp=head.batch.ref_logp[:3])
    head = LinearHead(head.hidden[:3], head.weight, head.bias, batch)
    return head, uk.Plan(max_chunk_bytes=budget(head, tokens, "cpu"))


ODD = "target must hold an even number of sequences, chosen and rejected, got 3"


@pytest.mark.parametrize("tokens", [3, None])
def test_an_odd_number_of_sequences_without_a_gradient_or_a_chunk_for_a_pair(tokens: int | None) -> None:
    head, plan = odd(tokens)
    hidden, weight, bias = leaves_of(head, () if tokens else ("hidden", "weight", "bias"))
    refused(lambda: uk.fused_linear_loss(hidden, weight, head.batch, uk.dpo(), bias=bias, plan=plan), ValueError, ODD)


@pytest.mark.parametrize("tokens", [4, None])
def test_an_odd_number_of_sequences(tokens: int | None) -> None:
    head, plan = odd(tokens)
    hidden, weight, bias = leaves_of(head)
    refused(lambda: uk.fused_linear_loss(hidden, weight, head.batch, uk.dpo(), bias=bias, plan=plan), ValueError, ODD)
