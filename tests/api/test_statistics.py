"""Level 1: the statistics of each row and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME, SHAPES, Shape, make_case
from tests.parity import as_stored
from tests.runners import Runner
from unirl_kernels.backends import COMPOSED
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations

BY_SHAPE = {shape.name: shape for shape in SHAPES}
READOUTS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.0625},
    "softcap": {"softcap": 5.0},
    "everything": {"temperature": 1.3, "softcap": 5.0, "scale": 0.5},
}


@pytest.fixture(autouse=True)
def _statistics_once(runner: Runner) -> None:
    if runner.kernel != COMPOSED:
        pytest.skip("statistics are the same for every one-pass kernel")


def by_oracle(logits: Tensor, target: Tensor, **readout: object) -> tuple[Tensor, Tensor, Tensor]:
    z = oracle.apply_readout(logits, **readout)
    used = target != uk.IGNORE
    values = (oracle.log_probs(z, target), oracle.entropy(z), torch.logsumexp(z, -1))
    return tuple(torch.where(used, x, 0.0) for x in values)


def compare(shape: Shape, runner: Runner, readout: dict[str, object], **temperature: Tensor) -> None:
    logits, batch = make_case(shape, BY_NAME["sft"], runner.device)
    readout = {**readout, **temperature}
    weights = torch.randn(3, *batch.target.shape, dtype=torch.float64).to(runner.device)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in readout.items()}

    def with_gradient(x: Tensor, stats: object, w: Tensor) -> list[Tensor]:
        value = sum((s * v).sum() for s, v in zip(stats, w, strict=True))
        (gradient,) = torch.autograd.grad(value, x)
        return [*(s.detach() for s in stats), gradient]

    x64, x32 = (logits.to(d).detach().requires_grad_() for d in (torch.float64, torch.float32))
    truth = with_gradient(x64, by_oracle(x64, batch.target, **exact), weights)
    plain = with_gradient(x32, by_oracle(x32, batch.target, **readout), weights.float())
    leaf = logits.detach().requires_grad_()
    stats = uk.token_stats(leaf, batch.target, readout=uk.Readout(**readout), plan=runner.plan())
    got = with_gradient(leaf, stats, weights.float())
    lse = max(truth[2].abs().max().item(), 1.0)
    for name, g, p, t in zip(stats._fields, got, plain, truth, strict=False):
        assert g.dtype == torch.float32
        assert not (problems := violations(g, p, t, condition=condition_of(t, lse))), f"{name}: {problems}"
    problems = violations(got[3], as_stored(plain[3], logits.dtype, runner.interpreted), truth[3], condition=2 * lse)
    assert not problems, f"gradient: {problems}"
    assert not got[3][batch.target == uk.IGNORE].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_gradients(shape: Shape, runner: Runner) -> None:
    if not runner.takes(shape):
        pytest.skip(f"{shape.n_logits} logits are too many for Triton's interpreter")
    if shape.fill == "masked":
        pytest.skip("autograd of the naive entropy is NaN at -inf; see test_masked_words")
    compare(shape, runner, {})


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("shape", ["small", "bf16", "row_padding"])
def test_readouts(readout: str, shape: str, runner: Runner) -> None:
    compare(BY_SHAPE[shape], runner, READOUTS[readout])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", ["small", "packed"])
def test_temperature_per_token(shape: str, softcap: float | None, runner: Runner) -> None:
    _, batch = make_case(BY_SHAPE[shape], BY_NAME["sft"], runner.device)
    temperature = (0.5 + torch.rand(batch.target.shape)).to(runner.device)
    compare(BY_SHAPE[shape], runner, {"softcap": softcap}, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_words(dtype: torch.dtype, runner: Runner) -> None:
    """-inf logits are as if their columns did not exist: same statistics, same gradients, exact zeros there."""
    kept = torch.arange(3, 300, 7)
    few = (torch.randn(4, len(kept)) * 3).to(dtype)
    logits = torch.full((4, 515), float("-inf"), dtype=dtype)
    logits[:, kept] = few
    weights = torch.randn(3, 4).to(runner.device)
    results = []
    for x, target in ((few, torch.arange(4)), (logits, kept[:4])):
        leaf = x.to(runner.device).detach().requires_grad_()
        stats = uk.token_stats(leaf, target.to(runner.device), plan=runner.plan())
        (gradient,) = torch.autograd.grad(sum((s * w).sum() for s, w in zip(stats, weights, strict=True)), leaf)
        results.append([*(s.detach() for s in stats), gradient])
    (*few_stats, few_gradient), (*stats, gradient) = results
    for a, b in zip(stats, few_stats, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient[:, kept], few_gradient)
    gradient[:, kept] = 0
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_target_that_is_masked(scale: float, dtype: torch.dtype, runner: Runner) -> None:
    """Its log-probability is -inf, its gradient that of log_softmax and gather: d_logp, and -d_logp p_j elsewhere."""
    runner.need(dtype)
    logits = torch.randn(2, 33).to(dtype)
    logits[0, [5, 9]] = float("-inf")
    target, d_logp, d_lse = torch.tensor([5, 5]), torch.tensor([-0.7, 0.3]), torch.tensor([0.2, -0.4])
    leaf = logits.double().requires_grad_()
    logp, entropy, lse = by_oracle(leaf, target, scale=scale)  # plain log_softmax and gather
    (expected,) = torch.autograd.grad((d_logp * logp + d_lse * lse).sum(), leaf)
    assert expected[0, 5].item() == pytest.approx(scale * -0.7)

    leaf = logits.to(runner.device).requires_grad_()
    stats = uk.token_stats(leaf, target.to(runner.device), readout=uk.Readout(scale=scale), plan=runner.plan())
    value = (d_logp.to(runner.device) * stats.logp + d_lse.to(runner.device) * stats.lse).sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    assert stats.logp[0].item() == float("-inf")
    for got, truth in zip(stats, (logp, entropy, lse), strict=True):
        torch.testing.assert_close(got.cpu().double(), truth, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.cpu(), expected.to(dtype))


def test_entropy_of_a_row_whose_target_is_masked(runner: Runner) -> None:
    """It does not depend on the target, nor does its gradient."""
    logits = torch.randn(1, 33)
    logits[0, 5] = float("-inf")
    results = []
    for y in (5, 6):
        leaf = logits.to(runner.device).requires_grad_()
        stats = uk.token_stats(leaf, torch.tensor([y]).to(runner.device), plan=runner.plan())
        results.append(torch.autograd.grad(stats.entropy.sum(), leaf)[0])
    torch.testing.assert_close(*results)
    assert results[0][0, 5] == 0


MASKS = [
    *((torch.float32, value) for value in (-1e4, -65504.0, -1e9, torch.finfo(torch.float32).min)),
    (torch.float16, -65504.0),
    (torch.bfloat16, -1e4),
    (torch.float64, -1e9),
]
"""Finite logits that users take instead of -inf to mask columns, by dtype."""


@pytest.mark.parametrize(("dtype", "mask"), MASKS, ids=str)
def test_target_of_a_finite_mask(dtype: torch.dtype, mask: float, runner: Runner) -> None:
    """logp is about as large as the mask, so its rounding is too: the gradient must not be computed from logp."""
    runner.need(dtype)
    logits = (torch.randn(2, 33) * 2).to(dtype)
    logits[:, 3] = mask
    logits[1, 20:] = mask
    target = torch.tensor([3, 3])

    def gradients(x: Tensor, stats: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        return [torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0] for value in stats(leaf)]

    truth = gradients(logits.double(), lambda x: by_oracle(x, target))
    plain = gradients(logits.to(torch.promote_types(dtype, torch.float32)), lambda x: by_oracle(x, target))
    got = gradients(logits.to(runner.device), lambda x: uk.token_stats(x, target.to(runner.device), plan=runner.plan()))
    for name, g, p, t in zip(uk.TokenStats._fields, got, plain, truth, strict=False):
        problems = violations(g.cpu(), as_stored(p, dtype, runner.interpreted), t)
        assert not problems, f"{name}: {problems}"


def test_target_of_a_probability_that_underflows(runner: Runner) -> None:
    """p_y = e^-200 is 0 in fp32, and the gradient at the target is still that of -log p_y: -1."""
    leaf = torch.tensor([[200.0, 0.0, -1.0]], device=runner.device).requires_grad_()
    stats = uk.token_stats(leaf, torch.tensor([1], device=runner.device), plan=runner.plan())
    (gradient,) = torch.autograd.grad(-stats.logp.sum(), leaf)
    assert stats.logp.item() == pytest.approx(-200)
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[1.0, -1.0, 0.0]]))


def test_not_a_number_is_visible_and_stays_in_its_row(runner: Runner) -> None:
    for value in (float("nan"), float("inf")):
        logits = torch.randn(3, 65)
        logits[1, 40] = value
        leaf = logits.to(runner.device).requires_grad_()
        stats = uk.token_stats(leaf, torch.tensor([1, 2, 3]).to(runner.device), plan=runner.plan())
        (gradient,) = torch.autograd.grad(stats.logp.sum(), leaf)
        assert torch.isnan(stats.logp[1])
        assert torch.isnan(gradient[1]).any()
        for row in (0, 2):
            assert torch.isfinite(stats.logp[row])
            assert torch.isfinite(gradient[row]).all()


def test_ignored_rows_are_not_read(runner: Runner) -> None:
    logits = torch.randn(4, 65)
    logits[1:3] = float("nan")
    target = torch.tensor([3, uk.IGNORE, uk.IGNORE, 4])
    leaf = logits.to(runner.device).requires_grad_()
    stats = uk.token_stats(leaf, target.to(runner.device), plan=runner.plan())
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in stats), leaf)
    for x in stats:
        assert not x[1:3].any()
    assert not gradient[1:3].any()
    assert torch.isfinite(gradient).all()


def test_log_probabilities_are_fp32_accurate_in_every_dtype(runner: Runner) -> None:
    """Within 2e-6 of fp64 for the same logits, whatever their dtype: no rounding to bf16 on the way."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (torch.randn(3, 32003) * 3).to(dtype)
        target = torch.randint(0, 32003, (3,))
        stats = uk.token_stats(logits.to(runner.device), target.to(runner.device), plan=runner.plan())
        truth = oracle.log_probs(logits.double(), target)
        assert (stats.logp.cpu().double() - truth).abs().max() < 2e-6


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("readout", READOUTS)
def test_gradcheck(readout: str, runner: Runner) -> None:
    """fp64 logits run the same kernels in fp64: analytic against numeric gradients of all three statistics."""
    if runner.interpreted and readout != "everything":
        pytest.skip("hundreds of evaluations are slow under the interpreter")
    runner.need(torch.float64)
    logits = torch.randn(1, 3, 5, dtype=torch.float64, device=runner.device).requires_grad_()
    target = torch.tensor([[0, uk.IGNORE, 4]], device=runner.device)

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(uk.token_stats(x, target, readout=uk.Readout(**READOUTS[readout]), plan=runner.plan()))

    assert torch.autograd.gradcheck(statistics, logits)
