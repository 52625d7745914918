"""What is changed in place: results by users, logits by their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.linear import NATIVE
from tests.runners import Runner
from unirl_kernels.backends import COMPOSED, load

V, D = 13, 6
TARGET = torch.tensor([[1, 2, 3], [4, uk.IGNORE, 5]])
MASK = torch.tensor([[True, False, True], [True, True, False]])
BATCH = uk.Batch(TARGET, torch.tensor([1.0, -0.5]), None, torch.full((2, 3), -3.0))
WEIGHT = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
SCOPES = {"token": uk.grpo(), "pair": uk.dpo()}

on_native = pytest.mark.parametrize("runner", NATIVE, ids=str)
of_losses = pytest.mark.parametrize("loss", SCOPES.values(), ids=SCOPES)


def gradient(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf * 1), leaf)[0]


STATISTICS: dict[str, Callable[[Tensor, uk.Plan], Any]] = {
    "logits": lambda x, plan: uk.token_stats(x, TARGET, plan=plan),
    "logits, observations": lambda x, plan: uk.token_observations(x, TARGET, plan=plan),
    "head": lambda x, plan: uk.linear_token_stats(x, WEIGHT, TARGET, plan=plan),
    "head, observations": lambda x, plan: uk.linear_token_observations(x, WEIGHT, TARGET, plan=plan),
}


@on_native
@pytest.mark.parametrize("statistic", ["logp", "entropy", "lse"])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_may_be_written_into(name: str, statistic: str, runner: Runner) -> None:
    """Users may change results in place, as those of log_softmax and gather: trainers zero masked positions."""
    if "observations" in name:
        runner.need_observations()
    x = torch.randn(2, 3, D if name.startswith("head") else V)

    def written(x: Tensor) -> Tensor:
        found = STATISTICS[name](x, uk.Plan(runner.backend))
        for value in found[3:]:
            value.zero_()
        value = getattr(found, statistic)
        value[~MASK] = 0
        value *= 2
        return value.sum()

    def masked(x: Tensor) -> Tensor:
        return 2 * (getattr(STATISTICS[name](x, uk.Plan(runner.backend)), statistic) * MASK).sum()

    torch.testing.assert_close(gradient(x, written), gradient(x, masked))


@on_native
@of_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "head"])
def test_outputs_may_be_written_into(linear: bool, dtype: torch.dtype, loss: uk.Loss, runner: Runner) -> None:
    x, weight = torch.randn(2, 3, D if linear else V).to(dtype), WEIGHT.to(dtype)
    plan = uk.Plan(runner.backend, None if loss.scope == "pair" else runner.kernel)

    def output(x: Tensor) -> uk.LossOutput:
        if linear:
            return uk.fused_linear_loss(x, weight, BATCH, loss, plan=plan)
        return uk.fused_loss(x, BATCH, loss, plan=plan)

    def written(x: Tensor) -> Tensor:
        out = output(x)
        for value in (out.logp, out.entropy, out.lse):
            value.fill_(torch.nan)
        out.loss.mul_(2)
        return out.loss

    assert torch.equal(gradient(x, written), gradient(x, lambda x: 2 * output(x).loss))


def failing(runner: Runner, name: str, error: BaseException, after: bool) -> Any:
    """A function of the backend that raises ``error``, without doing its work or after it."""
    own = getattr(load(runner.backend), name)

    def function(*args: Any) -> Any:
        if after:
            own(*args)
        raise error

    return function


KERNELS = [runner for runner in NATIVE if runner.backend in ("cpu", "eager") and runner.kernel != COMPOSED]


@pytest.mark.parametrize("runner", KERNELS, ids=str)
@of_losses
def test_logits_are_whole_when_the_call_raises(loss: uk.Loss, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the call is interrupted, they are empty, since a gradient may have been written."""
    plan = uk.Plan(runner.backend, overwrite_logits=True)
    name = "fused_loss" if loss.scope == "token" else "token_stats_backward"
    leaf = torch.randn(2, 4, V, requires_grad=True)
    expected = torch.autograd.grad(uk.fused_loss((leaf * 1)[:, 1:], BATCH, loss, plan=plan).loss, leaf)
    whole = leaf * 1
    part = whole[:, 1:]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(uk.fused_loss(part, BATCH, loss, plan=plan).loss, leaf)

    with monkeypatch.context() as patched:
        patched.setattr(load(runner.backend), name, failing(runner, name, MemoryError("none left"), after=False))
        with pytest.raises(MemoryError, match="none left"):
            run()
    assert torch.equal(whole, leaf)
    assert torch.equal(part, leaf[:, 1:])
    torch.testing.assert_close(run(), expected)
    whole = leaf * 1
    part = whole[:, 1:]
    with monkeypatch.context() as patched:
        patched.setattr(load(runner.backend), name, failing(runner, name, KeyboardInterrupt(), after=True))
        with pytest.raises(KeyboardInterrupt):
            run()
    assert whole.numel() == part.numel() == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: uk.Batch(TARGET.masked_fill(TARGET == 5, V), torch.ones(2)), IndexError, "target must lie in"),
        (lambda: uk.Batch(TARGET), ValueError, r"the objective reads t\.advantage"),
    ],
)
def test_logits_are_whole_when_the_batch_does_not_fit(make: Any, error: type[Exception], message: str) -> None:
    leaf = torch.randn(2, 3, V, requires_grad=True)
    x = leaf * 1
    with pytest.raises(error, match=message):
        uk.fused_loss(x, make(), uk.ppo(), plan=uk.Plan(overwrite_logits=True))
    assert torch.equal(x, leaf)


@of_losses
def test_overwritten_logits_are_told_of_by_name(loss: uk.Loss) -> None:
    """Another use of overwritten logits, and a second backward, raise errors that name ``overwrite_logits``."""
    plan, leaf = uk.Plan(overwrite_logits=True), torch.randn(2, 3, V, requires_grad=True)
    x = leaf * 1
    other = uk.token_stats(x, TARGET).logp.sum()
    value = uk.fused_loss(x, BATCH, loss, plan=plan).loss
    value.backward(retain_graph=True)
    with pytest.raises(ValueError, match=r"its memory was given to the gradient by overwrite_logits=True$"):
        uk.fused_loss(x, BATCH, loss)
    with pytest.raises(RuntimeError, match="overwrite_logits=True wrote their gradient there"):
        other.backward()
    once = "allows one backward" if loss.scope == "token" else "wrote their gradient there"
    before = leaf.grad.clone()
    with pytest.raises(RuntimeError, match=f"overwrite_logits=True {once}"):
        value.backward()
    assert torch.equal(leaf.grad, before)


@of_losses
def test_what_overwritten_logits_leave_behind(loss: uk.Loss) -> None:
    """Backwards that saved the logits raise. The logits are empty, with sum 0, and most functions raise on them. A
    ``detach()`` alias holds the gradient, as the docstring of ``Plan`` warns."""
    leaf = torch.randn(2, 3, V, requires_grad=True)
    plain = torch.autograd.grad(uk.fused_loss(leaf * 1, BATCH, loss).loss, leaf)[0]
    x = leaf * 1
    view, alias = x.view(-1), x.detach()
    summed, saved = x.sum(), [(x * x).sum(), (view * view).sum(), (x * alias).sum()]
    value = uk.fused_loss(x, BATCH, loss, plan=uk.Plan(overwrite_logits=True)).loss
    d_leaf = torch.autograd.grad(value + summed, leaf, retain_graph=True)[0]
    torch.testing.assert_close(d_leaf, plain + 1)
    for late in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(late, leaf)
    assert x.shape == (0,)
    assert x.sum() == 0
    for use in (lambda: x.argmax(-1), lambda: x[0, 0], lambda: torch.log_softmax(x.view(2, 3, V), -1)):
        with pytest.raises((RuntimeError, IndexError)):
            use()
    assert torch.equal(alias, view.view(2, 3, V))
    assert not torch.equal(alias, leaf)


def test_logits_that_a_checkpoint_keeps_are_not_overwritten() -> None:
    """Selective checkpointing keeps the memory of a matmul's result, and does not see that it is overwritten."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(_: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = function is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def grads(overwrite: bool) -> Tensor:
        hidden = torch.ones(2, 3, D, requires_grad=True)

        def head(hidden: Tensor) -> Tensor:
            logits = torch.nn.functional.linear(hidden.tanh(), WEIGHT)
            return uk.fused_loss(logits, BATCH, uk.sft(), plan=uk.Plan(overwrite_logits=overwrite)).loss

        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        loss: Any = checkpoint(head, hidden, use_reentrant=False, context_fn=contexts)
        return torch.autograd.grad(loss, hidden)[0]

    with pytest.raises(RuntimeError, match="overwrite_logits=True must not be used inside of selective"):
        grads(True)
    hidden = torch.ones(2, 3, D, requires_grad=True)
    plain = uk.fused_loss(hidden.tanh() @ WEIGHT.t(), BATCH, uk.sft()).loss
    torch.testing.assert_close(grads(False), torch.autograd.grad(plain, hidden)[0])
