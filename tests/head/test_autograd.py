"""Gradients of linear heads in autograd: scaled, computed twice, accumulated, of views and of tied weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME, LossCase
from tests.linear import (
    CHUNKED,
    GRADIENTS,
    RAGGED,
    SCOPES,
    CustomCase,
    LinearHead,
    Result,
    check_gradients,
    chosen_plan,
    fused,
    gradients_of,
    leaves_of,
    loss_of,
    make_head,
    naive,
)

of_scopes = pytest.mark.parametrize("loss", SCOPES, ids=str)


@of_scopes
def test_the_same_bits_on_a_rerun(loss: LossCase | CustomCase, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        head = make_head(RAGGED, loss, dtype, device)
        for tokens in (1, *CHUNKED, None):
            plan = chosen_plan(head, tokens)
            for a, b in zip(fused(head, loss.make(), plan), fused(head, loss.make(), plan), strict=True):
                assert torch.equal(a, b)


@of_scopes
@pytest.mark.parametrize("factor", [-2.5, 0.0, 65536.0])
def test_upstream_gradient_scales(loss: LossCase | CustomCase, factor: float, device: str) -> None:
    head = make_head(RAGGED, loss, device=device)
    for tokens in CHUNKED:
        results = []
        for by in (1.0, factor):
            leaves = leaves_of(head)
            results.append(gradients_of(loss_of(head, leaves, loss, tokens) * by, leaves))
        for one, scaled in zip(*results, strict=True):
            torch.testing.assert_close(scaled, factor * one)
            assert scaled.any() == bool(factor)


@pytest.mark.parametrize("name", ["grpo_global_token_mean", "dpo"])
def test_fp16_under_a_gradient_scaler(name: str, device: str) -> None:
    """Gradients of single tokens are too small for fp16, so they are rounded after scaling."""
    case, scale = BY_NAME[name], 65536.0
    if name == "grpo_global_token_mean":
        loss = uk.Loss(uk.grpo().objective, uk.TokenMean(1e6))
        case = LossCase(name, lambda: loss, "grpo", {"how": "token_mean", "n": 1e6})
    head = make_head(RAGGED, case, torch.float16, device)
    for tokens in CHUNKED:
        leaves = leaves_of(head)
        value = loss_of(head, leaves, case, tokens)
        gradients = gradients_of(value * scale, leaves)
        truth, plain = (naive(head.used.to(dtype), case, {}) for dtype in (torch.float64, torch.float32))
        plain, truth = (x._replace(**{n: scale * getattr(x, n) for n in GRADIENTS}) for x in (plain, truth))
        check_gradients(Result(value.detach(), *gradients, None, None), [plain], truth, head, condition=16.0)


@of_scopes
def test_a_kept_graph_can_be_used_again(loss: LossCase | CustomCase, device: str) -> None:
    head = make_head(RAGGED, loss, device=device)
    for tokens in CHUNKED:
        leaves = leaves_of(head)
        value = 3 * loss_of(head, leaves, loss, tokens)
        first, second = (gradients_of(value, leaves, retain_graph=True) for _ in range(2))
        last = gradients_of(value, leaves)
        for a, b, c in zip(first, second, last, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)
        with pytest.raises(RuntimeError, match="second time"):
            gradients_of(value, leaves)


@of_scopes
def test_differentiating_twice_is_refused(loss: LossCase | CustomCase, device: str) -> None:
    head = make_head(RAGGED, loss, device=device)
    for tokens in CHUNKED:
        leaves = leaves_of(head)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            gradients_of(loss_of(head, leaves, loss, tokens), leaves, create_graph=True)
    hidden, weight, bias = leaves
    stats = uk.linear_token_stats(hidden, weight, head.batch.target, bias=bias)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradients_of(stats.logp.sum(), leaves, create_graph=True)


@of_scopes
def test_several_losses_on_one_head_and_backward_into_grad(loss: LossCase | CustomCase, device: str) -> None:
    head = make_head(RAGGED, loss, device=device)
    for tokens in CHUNKED:
        leaves = leaves_of(head)
        alone = [gradients_of(by * loss_of(head, leaves, loss, tokens), leaves) for by in (1, 2)]
        (loss_of(head, leaves, loss, tokens) + 2 * loss_of(head, leaves, loss, tokens)).backward()
        for leaf, a, b in zip(leaves, *alone, strict=True):
            torch.testing.assert_close(leaf.grad, a + b)
        loss_of(head, leaves, loss, tokens).backward()  # a step of gradient accumulation
        for leaf, a, b in zip(leaves, *alone, strict=True):
            torch.testing.assert_close(leaf.grad, 2 * a + b)


def test_parts_of_the_gradient_can_be_asked_for(device: str) -> None:
    head = make_head(RAGGED, BY_NAME["grpo"], device=device)
    leaves = leaves_of(head)
    together = gradients_of(loss_of(head, leaves, BY_NAME["grpo"], 3), leaves)
    for leaf, expected in zip(leaves, together, strict=True):
        (alone,) = torch.autograd.grad(loss_of(head, leaves, BY_NAME["grpo"], 3), leaf)
        assert torch.equal(alone, expected)


@of_scopes
def test_tied_embeddings(loss: LossCase | CustomCase, device: str) -> None:
    """The same parameter as embedding and as head: the gradients of both uses add up."""
    head = make_head(RAGGED, loss, device=device).to(torch.float64)
    input_ids = torch.randint(0, RAGGED.vocab, head.batch.target.shape).to(device)

    def gradient(value_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        weight = head.weight.clone().requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(input_ids, weight))
        return torch.autograd.grad(value_of(hidden, weight), weight)[0]

    expected = gradient(lambda hidden, weight: uk.fused_loss(hidden @ weight.t(), head.batch, loss.make()).loss)
    for tokens in CHUNKED:
        got = gradient(lambda hidden, weight, n=tokens: loss_of(head, [hidden, weight, None], loss, n))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


VIEWS: dict[str, Callable[[LinearHead], tuple[Tensor, Tensor]]] = {
    "hidden_of_a_longer_sequence": lambda head: (
        torch.nn.functional.pad(head.used.hidden, (0, 0, 0, 1)).requires_grad_(),
        head.weight.clone().requires_grad_(),
    ),
    "weight_transposed": lambda head: (
        head.used.hidden.clone().requires_grad_(),
        head.weight.t().contiguous().requires_grad_(),
    ),
    "hidden_of_one_state": lambda head: (
        head.used.hidden[:1, :1].clone().requires_grad_(),
        head.weight.clone().requires_grad_(),
    ),
}


@pytest.mark.parametrize("view", VIEWS)
@of_scopes
def test_operands_that_are_views(loss: LossCase | CustomCase, view: str, device: str) -> None:
    """hidden[:, :-1], a weight stored [D, V], hidden states expanded with stride 0: as if they were copied."""
    head = make_head(RAGGED, loss, device=device)

    def seen(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if view == "hidden_of_a_longer_sequence":
            return hidden[:, :-1], weight
        return (hidden, weight.t()) if view == "weight_transposed" else (hidden.expand(head.hidden.shape), weight)

    for tokens in CHUNKED:
        results = []
        for copied in (False, True):
            leaves = VIEWS[view](head)
            hidden, weight = seen(*leaves)
            if copied:
                hidden, weight = hidden.contiguous(), weight.contiguous()
            value = loss_of(head, [hidden, weight, head.bias], loss, tokens)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
            assert [g.shape for g in results[-1][1:]] == [x.shape for x in leaves]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
