"""Transforms of PyTorch besides backward: those that are not supported raise an error; meta tensors give shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import unirl_kernels as uk

V, D = 13, 6
TARGET = torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(0))
REF = torch.full((2, 5), -3.0)
WEIGHT = torch.randn(V, D, generator=torch.Generator().manual_seed(1))

Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

FUNCTIONS: dict[str, Function] = {
    "token_stats": lambda x, w, target, ref: uk.token_stats(x, target).logp.sum(),
    "sft": lambda x, w, target, ref: uk.fused_loss(x, uk.Batch(target), uk.sft()).loss,
    "dpo": lambda x, w, target, ref: uk.fused_loss(x, uk.Batch(target, ref_logp=ref), uk.dpo()).loss,
    "linear_token_stats": lambda x, w, target, ref: uk.linear_token_stats(x[..., :D], w, target).logp.sum(),
    "linear sft": lambda x, w, target, ref: uk.fused_linear_loss(x[..., :D], w, uk.Batch(target), uk.sft()).loss,
    "linear dpo": lambda x, w, target, ref: (
        uk.fused_linear_loss(x[..., :D], w, uk.Batch(target, ref_logp=ref), uk.dpo()).loss
    ),
}

of_functions = pytest.mark.parametrize("name", FUNCTIONS)


def of_logits(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: FUNCTIONS[name](x, WEIGHT, TARGET, REF)


@of_functions
def test_function_transforms_are_refused(name: str) -> None:
    """Forward mode would give tangents of zero."""
    x, f = torch.randn(2, 5, V), of_logits(name)
    calls: list[Callable[[], Any]] = [
        lambda: torch.func.jvp(f, (x,), (x,)),
        lambda: torch.func.grad(f)(x),
        lambda: torch.vmap(f)(x.unsqueeze(0)),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"^(logits|hidden) must not be transformed by torch\.func"):
            call()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match=r"forward.mode"):
            f(dual)


@of_functions
def test_second_derivatives_are_refused(name: str) -> None:
    x = torch.randn(2, 5, V, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again: call backward without create_graph=True"):
        torch.autograd.grad(of_logits(name)(x), x, create_graph=True)


@of_functions
def test_shapes_on_the_meta_device(name: str) -> None:
    x, *rest = (y.to("meta") for y in (torch.randn(2, 5, V), WEIGHT, TARGET, REF))
    x.requires_grad_()
    value = FUNCTIONS[name](x, *rest)
    value.backward()
    assert value.is_meta
    assert value.shape == ()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@of_functions
def test_shapes_in_fake_tensor_mode(name: str) -> None:
    real = (torch.randn(2, 5, V), WEIGHT, TARGET, REF)
    with FakeTensorMode() as mode:
        x, *rest = (mode.from_tensor(y) for y in real)
        x.requires_grad_()
        value = FUNCTIONS[name](x, *rest)
        value.backward()
        assert value.shape == ()
        assert x.grad is not None
        assert x.grad.shape == x.shape
    assert type(of_logits(name)(real[0])) is Tensor, "something made of shapes alone was kept"


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_packed_batches(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, V), torch.randn(3, V)], layout=layout)
    with pytest.raises(TypeError, match="logits must be a dense tensor, got a nested tensor: pack it, with cu_seqlens"):
        uk.token_stats(nested, TARGET)
    with pytest.raises(TypeError, match=r"logits must be a dense tensor, got layout torch\.sparse_coo$"):
        uk.token_stats(torch.randn(2, 5, V).to_sparse(), TARGET)


@pytest.mark.parametrize(
    ("loss", "of_head"),
    [(uk.ppo(), False), (uk.ppo(), True), (uk.dpo(), True)],
    ids=["token", "token, head", "pair, head"],
)
def test_tangents_of_fields_are_refused(loss: uk.Loss, of_head: bool) -> None:
    """PyTorch's own code propagates them; a kernel would drop them."""
    x = torch.randn(2, 5, D if of_head else V, requires_grad=True)
    with torch.autograd.forward_ad.dual_level():
        ref = torch.autograd.forward_ad.make_dual(REF, REF)
        advantage = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2))
        batch = uk.Batch(TARGET, advantage, ref_logp=ref)
        # Objectives of pairs run in PyTorch, which has no tangents of segment_reduce.
        with pytest.raises(NotImplementedError, match=r"forward.(mode|AD)"):
            uk.fused_linear_loss(x, WEIGHT, batch, loss) if of_head else uk.fused_loss(x, batch, loss)


@of_functions
def test_a_batch_of_upstream_gradients(name: str) -> None:
    x = torch.randn(2, 5, V, requires_grad=True)
    factors = torch.tensor([1.0, -2.0, 0.5])
    (got,) = torch.autograd.grad(of_logits(name)(x), x, factors, is_grads_batched=True)
    (one,) = torch.autograd.grad(of_logits(name)(x), x)
    torch.testing.assert_close(got, factors.view(3, 1, 1, 1) * one)
