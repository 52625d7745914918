"""Observations of a linear head, merged from tiles of the vocabulary, are compared with those of whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.observed import check
from tests.runners import Runner
from unirl_kernels.api.linear import observed_linear_loss
from unirl_kernels.backends import COMPOSED
from unirl_kernels.head.statistics import TOKENS_OF_TILE
from unirl_kernels.testing import oracle

VOCAB, D = 61, 5
WIDTHS = (1, 7, 30, VOCAB)
READOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "negative": {"scale": -1.5, "temperature": 0.7},
    "softcap": {"softcap": 3.0},
}


@pytest.fixture
def runner(runner: Runner) -> Runner:
    if runner.kernel != COMPOSED:
        pytest.skip("observations are the same for every one-pass kernel")
    runner.need_observations()
    return runner


def tile_of(runner: Runner) -> int:
    """Columns of a tile. There are several tiles, but only three under the slow interpreter."""
    return 30 if runner.interpreted else 7


def plan_of(runner: Runner, width: int | None = None) -> uk.Plan:
    return uk.Plan(backend=runner.backend, max_chunk_bytes=4 * TOKENS_OF_TILE * (width or tile_of(runner)))


def head_of(runner: Runner) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets; small integers, so that logits are exact and their maxima tie."""
    n = 3 if runner.interpreted else 9
    hidden, weight, bias = (torch.randint(-2, 3, shape).float() for shape in ((n, D), (VOCAB, D), (VOCAB,)))
    target = torch.randint(0, VOCAB, (n,))
    target[1] = uk.IGNORE
    hidden[1] = torch.nan
    return tuple(x.to(runner.device) for x in (hidden, weight, bias, target))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("readout", READOUTS)
def test_tiles_give_what_the_logits_give(readout: str, width: int, runner: Runner) -> None:
    if runner.interpreted and (readout, width) != ("softcap", 30):
        pytest.skip("one case shows it; a kernel is slow under the interpreter")
    hidden, weight, bias, target = head_of(runner)
    how = READOUTS[readout]
    found = uk.linear_token_observations(
        hidden, weight, target, bias=bias, readout=uk.Readout(**how), plan=plan_of(runner, width)
    )
    logits = torch.nan_to_num(hidden) @ weight.t() + bias
    tied = (logits == logits.amax(-1, keepdim=True)).sum(-1) > 1
    assert tied.any()
    z = (oracle.apply_readout(logits.double(), **how), oracle.apply_readout(logits, **how))
    check(found, logits, target, *z, how.get("scale", 1.0))
    stats = uk.linear_token_stats(
        hidden, weight, target, bias=bias, readout=uk.Readout(**how), plan=plan_of(runner, width)
    )
    for x, y in zip(stats, found, strict=False):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_real_numbers(dtype: torch.dtype, runner: Runner) -> None:
    hidden, weight = torch.randn(2, 3, 16).to(dtype), (torch.randn(VOCAB, 16) * 2).to(dtype)
    target = torch.randint(0, VOCAB, (2, 3))
    hidden, weight, target = (x.to(runner.device) for x in (hidden, weight, target))
    found = uk.linear_token_observations(hidden, weight, target, plan=plan_of(runner))
    logits = hidden.double() @ weight.double().t()
    check(found, logits, target, logits, logits.to(torch.promote_types(dtype, torch.float32)))


@pytest.mark.parametrize("how", [{"softcap": 2.0}, {"temperature": 3.0}, {"softcap": 2.0, "scale": -1.0}], ids=str)
def test_rounding_hides_no_maximum(how: dict[str, Any], runner: Runner) -> None:
    """Two columns in different tiles have the same rounded z: the argmax is the larger raw logit."""
    if runner.interpreted and len(how) == 1:
        pytest.skip("one case shows it; a kernel is slow under the interpreter")
    near, far = (torch.tensor(90.0), torch.tensor(90.5)) if "softcap" in how else (torch.tensor(16.0), None)
    far = torch.nextafter(near, torch.tensor(torch.inf)) if far is None else far
    weight = torch.zeros(VOCAB, 1)
    weight[2, 0], weight[50, 0] = near, far
    weight *= how.get("scale", 1.0)
    hidden, target = torch.ones(2, 1), torch.tensor([3, 4])
    args = (x.to(runner.device) for x in (hidden, weight, target))
    found = uk.linear_token_observations(*args, readout=uk.Readout(**how), plan=plan_of(runner))
    assert found.argmax.tolist() == [50, 50]


def test_columns_that_cannot_come(runner: Runner) -> None:
    """The first and the last tile are all -inf: they do not change the sums or the argmax; the mean is -inf."""
    hidden, weight, _, target = head_of(runner)
    bias = torch.full((VOCAB,), -torch.inf, device=runner.device)
    bias[31:34] = 0
    target = torch.where(target == uk.IGNORE, target, 32)
    found = uk.linear_token_observations(hidden, weight, target, bias=bias, plan=plan_of(runner))
    used = target != uk.IGNORE
    few = (hidden @ weight[31:34].t())[used]
    assert torch.equal(found.argmax[used], 31 + few.argmax(-1))
    assert found.mean_logit[used].isneginf().all()
    torch.testing.assert_close(found.log_sum_sq_probs[used], few.log_softmax(-1).mul(2).logsumexp(-1))
    assert found.argmax[~used].tolist() == [-1]
    assert not found.mean_logit[~used].any()


def test_a_row_that_is_broken_in_one_tile(runner: Runner) -> None:
    hidden, weight, bias, target = head_of(runner)
    for column in (2, VOCAB - 1):
        spoilt = bias.clone()
        spoilt[column] = torch.nan
        found = uk.linear_token_observations(hidden, weight, target, bias=spoilt, plan=plan_of(runner))
        assert (found.argmax == -1).all()


def test_targets_outside_the_vocabulary(runner: Runner) -> None:
    hidden, weight, bias, target = head_of(runner)
    target[0] = VOCAB
    if runner.device == "cpu":
        with pytest.raises(IndexError, match=rf"target must lie in \[0, {VOCAB}\)"):
            uk.linear_token_observations(hidden, weight, target, bias=bias, plan=plan_of(runner))
    else:
        found = uk.linear_token_observations(hidden, weight, target, bias=bias, plan=plan_of(runner))
        assert found.argmax[0].item() == -1
        assert all(x[0].isnan() for x in found[:-1])


def arguments(runner: Runner) -> tuple[Any, ...]:
    hidden, weight, bias, target = head_of(runner)
    leaves = (torch.nan_to_num(x).requires_grad_() for x in (hidden, weight, bias))
    return *leaves, target


def test_gradients_are_those_of_linear_token_stats(runner: Runner) -> None:
    hidden, weight, bias, target = arguments(runner)
    weights = torch.randn(3, *target.shape, device=runner.device)
    results = []
    for measure in (uk.linear_token_stats, uk.linear_token_observations):
        found = measure(hidden, weight, target, bias=bias, plan=plan_of(runner))
        assert [x.requires_grad for x in found] == [True] * 3 + [False] * (len(found) - 3)
        value = sum((x * w).sum() for x, w in zip(found, weights, strict=False))
        results.append(torch.autograd.grad(value, (hidden, weight, bias)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow_interpreted
def test_compiles_without_a_graph_break(runner: Runner) -> None:
    torch.compiler.reset()
    hidden, weight, bias, target = arguments(runner)

    def f(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        found = uk.linear_token_observations(h, w, target, bias=b, plan=plan_of(runner))
        top = uk.token_observations(h @ w.t() + b, target, plan=runner.plan())
        agree = (found.argmax == top.argmax).float() + found.mean_logit - top.log_sum_sq_probs
        return (found.logp - 0.1 * top.entropy + agree.detach()).sum()

    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        value = g(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("loss", [uk.sft(), uk.grpo(), uk.dpo()], ids=["token", "two terms", "pair"])
def test_of_the_logits_that_give_a_loss(loss: uk.Loss, rows: int, runner: Runner) -> None:
    """In chunks of some tokens, or in four matmuls where a pair does not fit; and without a gradient."""
    if runner.interpreted and rows != 4:
        pytest.skip("one case shows it; a kernel is slow under the interpreter")
    hidden, weight, bias, target = head_of(runner)
    target[0] = 5
    n = len(target)
    ends = torch.tensor([0, 2, n] if n > 3 else [0, 1, n], device=runner.device)
    advantage = torch.tensor([1.0, -0.5], device=runner.device)
    ref_logp = torch.full((n,), -3.0, device=runner.device)
    batch = uk.Batch(target, advantage, None, ref_logp, ends)
    how: dict[str, Any] = {"bias": bias, "readout": uk.Readout(temperature=0.7)}
    plan = uk.Plan(backend=runner.backend, kernel=COMPOSED, max_chunk_bytes=4 * VOCAB * rows)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    out, seen = observed_linear_loss(*leaves, batch, loss, **how, plan=plan)
    expected = uk.fused_linear_loss(*leaves, batch, loss, **how, plan=plan)
    assert torch.equal(out.loss, expected.loss)
    gradients = [torch.autograd.grad(found.loss, leaves, retain_graph=True) for found in (out, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    alone = uk.linear_token_observations(hidden, weight, target, **how, plan=plan)
    for name, a, b in zip(alone._fields, seen, alone, strict=True):
        assert not a.requires_grad, name
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(seen.argmax, alone.argmax)
    with torch.no_grad():
        value, again = observed_linear_loss(*leaves, batch, loss, **how, plan=plan)
    assert all(map(torch.equal, again, alone))
    torch.testing.assert_close(value.loss, out.loss.detach(), rtol=1e-5, atol=1e-6)
