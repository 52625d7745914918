"""Loss and gradient of every loss, backend, kernel and shape against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

import unirl_kernels as uk
from tests.cases import BY_NAME, LOSSES, SHAPES, LossCase, Shape, make_case
from tests.parity import check, fused
from tests.runners import RUNNERS, Runner
from unirl_kernels.program import evaluate
from unirl_kernels.testing import oracle

EVERY_LOSS_ON = [shape for shape in SHAPES if shape.name in ("small", "packed")]
EVERY_SHAPE_WITH = [BY_NAME[name] for name in ("sft", "grpo", "dpo")]


def cases(runner: Runner) -> list[tuple[LossCase, Shape]]:
    """Every loss on a shape of each layout, every shape with a loss of each kind; fewer under the interpreter."""
    on, used = (EVERY_LOSS_ON[:1], EVERY_SHAPE_WITH[1:]) if runner.interpreted else (EVERY_LOSS_ON, EVERY_SHAPE_WITH)
    pairs = [(loss, shape) for loss in LOSSES for shape in on]
    pairs += [(loss, shape) for shape in SHAPES if shape not in on for loss in used]
    return [(loss, shape) for loss, shape in pairs if runner.runs(loss) and runner.takes(shape)]


def parametrized(*triples: tuple[Runner, LossCase, Shape]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("runner", "loss", "shape"), triples, ids=str)


def run(runner: Runner, loss: LossCase, shape: Shape, **choices: bool) -> None:
    logits, batch = make_case(shape, loss, runner.device)
    check(fused(logits, batch, loss.make(), runner.plan(**choices)), logits, batch, loss, runner.interpreted)


@parametrized(*((runner, *case) for runner in RUNNERS for case in cases(runner)))
def test_loss_and_gradient(runner: Runner, loss: LossCase, shape: Shape) -> None:
    run(runner, loss, shape)


SMALL_SHAPES = [shape for shape in SHAPES if shape.n_logits < 10_000]


@parametrized(
    *((runner, BY_NAME["grpo"], s) for runner in RUNNERS for s in SMALL_SHAPES[:: 4 if runner.interpreted else 1])
)
def test_overwriting_the_logits(runner: Runner, loss: LossCase, shape: Shape) -> None:
    run(runner, loss, shape, overwrite_logits=True)


@parametrized(*((runner, loss, SHAPES[0]) for runner in RUNNERS for loss in LOSSES if runner.runs(loss)))
def test_on_policy(runner: Runner, loss: LossCase, shape: Shape) -> None:
    """Without old_logp the ratio is 1, but its gradient is not 0."""
    logits, batch = make_case(shape, loss, runner.device)
    batch = uk.Batch(batch.target, batch.advantage, None, batch.ref_logp)
    check(fused(logits, batch, loss.make(), runner.plan()), logits, batch, loss, runner.interpreted)


def test_advantage_per_token(runner: Runner) -> None:
    loss = BY_NAME["ppo"]
    for shape in EVERY_LOSS_ON:
        logits, batch = make_case(shape, loss, runner.device)
        advantage = torch.randn(batch.target.shape).to(runner.device)
        batch = uk.Batch(batch.target, advantage, batch.old_logp, batch.ref_logp, batch.cu_seqlens)
        check(fused(logits, batch, loss.make(), runner.plan()), logits, batch, loss, runner.interpreted)


@pytest.mark.parametrize("loss", ["sft", "ppo"])
def test_target_that_is_masked(loss: str, runner: Runner) -> None:
    """Probability 0: an infinite loss or a ratio of 0, and the gradient of log_softmax and gather."""
    case = BY_NAME[loss]
    logits, batch = make_case(SHAPES[0], case, runner.device)
    first = tuple(batch.valid.nonzero()[0].tolist())
    logits[(*first, batch.target[first])] = float("-inf")
    got = fused(logits, batch, case.make(), runner.plan())
    check(got, logits, batch, case, runner.interpreted)
    assert bool(got.loss.isinf()) == (loss == "sft")
    assert bool(got.d_logits[first].any()) == (loss == "sft")


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradient_is_equation_1(loss: LossCase) -> None:
    """The oracle's autograd agrees with its coefficients typed in from equations (4), (7), (11) and (15)."""
    if loss.hyper.get("how", "sequence_mean") != "sequence_mean":
        pytest.skip("equation (1) is written for the mean over sequences of the mean over tokens")
    logits, batch = make_case(SHAPES[0], loss)
    leaf = logits.double().requires_grad_()
    (by_autograd,) = torch.autograd.grad(oracle.loss(loss.algorithm, leaf, batch, **loss.hyper), leaf)
    by_equation = oracle.gradient(loss.algorithm, leaf, batch, **loss.hyper)
    torch.testing.assert_close(by_equation, by_autograd, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", [case for case in LOSSES if case.make().scope == "token"], ids=str)
def test_derived_coefficient_is_the_typed_one(loss: LossCase) -> None:
    """GC = -d_logp as derived from the objective equals the equations of the paper."""
    _, batch = make_case(SHAPES[0], loss)
    logits, _ = make_case(SHAPES[0], loss)
    logp = oracle.log_probs(logits.double(), batch.target)
    made = loss.make()
    traced, ones = made.traced(), (torch.ones_like(logp),)
    fields = torch.stack([made.field(name, batch, ones).double().expand_as(logp) for name in traced.fields])
    params = torch.tensor(traced.params, dtype=torch.float64)
    _, d_logp, d_entropy, d_lse = evaluate(traced.program, (logp, logp, logp), fields, params)
    hyper = {name: x for name, x in loss.hyper.items() if name not in ("how", "n")}
    gc = oracle.coefficients(loss.algorithm, logp, batch, **hyper).view(logp.shape)
    torch.testing.assert_close(-d_logp[batch.valid], gc[batch.valid], rtol=1e-12, atol=1e-14)
    assert not d_entropy.any()
    assert not d_lse.any()


def test_cases_reach_both_sides_of_the_clip() -> None:
    """Both signs of advantage, inside and outside the clip on both sides: no branch of the surrogate is untested."""
    seen = set()
    for seed in range(4):
        logits, batch = make_case(SHAPES[0], BY_NAME["grpo"], seed=seed)
        ratio = torch.exp(oracle.log_probs(logits, batch.target) - batch.old_logp)[batch.valid]
        advantage = batch.per_token(batch.advantage)[batch.valid]
        side = (ratio > 1.2).long() - (ratio < 0.8).long()
        seen |= set(zip(side.tolist(), advantage.sign().tolist(), strict=True))
    assert seen == {(side, sign) for side in (-1, 0, 1) for sign in (-1.0, 1.0)}
