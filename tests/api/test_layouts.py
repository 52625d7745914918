"""Every argument in every allowed layout, on every path: results are the same as for contiguous arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.runners import Runner
from unirl_kernels.backends import COMPOSED

B, L, V, D = 2, 3, 16, 8

Layout = Callable[[Tensor], Tensor]


def strided(x: Tensor) -> Tensor:
    """A copy of x as every second element of a larger tensor."""
    memory = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    memory[..., ::2] = x
    return memory[..., ::2]


def unaligned(x: Tensor) -> Tensor:
    """A copy of x that starts one element after the start of its memory."""
    return torch.cat([torch.zeros(1, dtype=x.dtype), x.reshape(-1)])[1:].view(x.shape)


def transposed(x: Tensor) -> Tensor:
    """A copy of x whose first dimension is the innermost in memory."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


LAYOUTS: dict[str, Layout] = {"strided": strided, "unaligned": unaligned, "transposed": transposed}


def own(t: Any) -> Tensor:
    return -t.weight * t.logp + t.shift


LOSSES = {
    "grpo": uk.grpo(),
    "dpo": uk.dpo(),
    "own": uk.Loss(own, uk.TokenMean()),
    "weighted": uk.Loss(uk.sft().objective, uk.Weighted(uk.SequenceMean(), "weight")),
}


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    batch: uk.Batch
    readout: uk.Readout


def make(layout: Layout, packed: bool, device: str) -> Case:
    random = torch.Generator().manual_seed(0)
    target = torch.randint(0, V, (B, L), generator=random)
    target[0, 1] = uk.IGNORE
    of_tokens = [-1 - torch.rand(B, L, generator=random) for _ in range(4)]
    of_sequences = [torch.randn(B, generator=random) for _ in range(2)]

    def laid(x: Tensor) -> Tensor:
        return layout(x.flatten(0, 1) if packed and x.shape[:2] == (B, L) else x).to(device)

    old_logp, ref_logp, weight, temperature = map(laid, of_tokens)
    advantage, shift = map(laid, of_sequences)
    ends = layout(torch.tensor([0, 3, 6], dtype=torch.int32)).to(device) if packed else None
    batch = uk.Batch(laid(target), advantage, old_logp, ref_logp, ends, {"weight": weight, "shift": shift})
    shapes = ((B, L, D), (V, D), (V,))
    operands = (laid(torch.randn(*shape, generator=random)) for shape in shapes)
    return Case(*operands, batch, uk.Readout(-temperature))


def with_gradients(values: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The values, and the gradients of the sum of their means. The upstream gradients are expanded tensors."""
    gradients = torch.autograd.grad(sum((x.mean() for x in values[1:]), values[0].mean()), leaves)
    return [x.detach().reshape(-1) for x in (*values, *gradients)]


def losses(case: Case, runner: Runner) -> list[Tensor]:
    hidden, weight, bias, batch, readout = case
    found: list[Tensor] = []
    for name, loss in LOSSES.items():
        if (name == "dpo" and runner.kernel != COMPOSED) or (name != "own" and runner.interpreted):
            continue
        logits = torch.nn.functional.linear(hidden, weight, bias).detach().requires_grad_()
        out = uk.fused_loss(logits, batch, loss, readout=readout, plan=runner.plan())
        found += [*with_gradients([out.loss], [logits]), *out.terms, *out.metrics.values()]
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        for tokens in (B * L, B * L // 2):
            plan = uk.Plan(runner.backend, runner.kernel, max_chunk_bytes=4 * V * tokens)
            out = uk.fused_linear_loss(*leaves[:2], batch, loss, bias=leaves[2], readout=readout, plan=plan)
            found += with_gradients([out.loss], leaves)
    return found


def statistics(case: Case, runner: Runner) -> list[Tensor]:
    hidden, weight, bias, batch, readout = case
    how: dict[str, Any] = {"readout": readout, "plan": uk.Plan(runner.backend)}
    logits = torch.nn.functional.linear(hidden, weight, bias).detach().requires_grad_()
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    return [
        *with_gradients(uk.token_stats(logits, batch.target, **how), [logits]),
        *with_gradients(uk.linear_token_stats(*leaves[:2], batch.target, bias=leaves[2], **how), leaves),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_layouts(packed: bool, layout: str, runner: Runner) -> None:
    if runner.interpreted and (layout != "strided" or not packed):
        pytest.skip("one layout shows it; a row is slow under the interpreter")
    of = statistics if runner.kernel == COMPOSED and runner.interpreted else lambda *a: losses(*a) + statistics(*a)
    expected = of(make(torch.Tensor.contiguous, packed, runner.device), runner)
    for got, wanted in zip(of(make(LAYOUTS[layout], packed, runner.device), runner), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_tensors_that_repeat_one_element(runner: Runner) -> None:
    """Expanded arguments: one hidden state, one target and one advantage for all tokens."""
    hidden, weight = torch.randn(D), torch.randn(V, D)
    target, advantage = torch.tensor(3), torch.tensor(0.5)
    old_logp = torch.tensor(-2.0)

    def loss(expand: Callable[[Tensor], Tensor]) -> Tensor:
        tokens = (hidden.expand(B, L, D), target.expand(B, L), advantage.expand(B), old_logp.expand(B, L))
        x, *fields = (expand(y).to(runner.device) for y in tokens)
        batch = uk.Batch(*fields)
        return uk.fused_linear_loss(x, weight.to(runner.device), batch, uk.ppo(), plan=runner.plan()).loss

    torch.testing.assert_close(loss(lambda x: x), loss(torch.Tensor.contiguous))


def test_masks_and_ids_in_any_layout() -> None:
    ids, mask = torch.randint(0, V, (3, 5)), torch.rand(3, 5) > 0.5
    for layout in LAYOUTS.values():
        assert torch.equal(uk.shift_targets(layout(ids), layout(mask)), uk.shift_targets(ids, mask))


@pytest.mark.parametrize("kernel", [None, COMPOSED])
@pytest.mark.parametrize("which", ["hidden", "weight", "bias"])
def test_the_negative_of_a_tensor_that_pytorch_has_not_computed_yet(which: str, kernel: str | None) -> None:
    """``z.conj().imag`` is such a tensor."""
    head = {"hidden": torch.randn(B, L, D), "weight": torch.randn(V, D), "bias": torch.randn(V)}
    batch, plan = uk.Batch(torch.zeros(B, L, dtype=torch.int64)), uk.Plan(kernel=kernel)
    head["hidden"].requires_grad_()
    expected = uk.fused_linear_loss(batch=batch, loss=uk.sft(), plan=plan, **head).loss
    head[which] = torch._neg_view(-head[which])
    torch.testing.assert_close(uk.fused_linear_loss(batch=batch, loss=uk.sft(), plan=plan, **head).loss, expected)
