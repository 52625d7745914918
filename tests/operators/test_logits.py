"""The operators as PyTorch sees them: opcheck, torch.compile, autocast, checkpointing, autograd's corner cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME, SHAPES, make_case
from tests.runners import Runner
from unirl_kernels.api.rows import program_args
from unirl_kernels.backends import COMPOSED
from unirl_kernels.backends.groups import ReadoutArgs, RowGradients
from unirl_kernels.operators import rows
from unirl_kernels.operators.declare import flat

SMALL = SHAPES[0]


def example(runner: Runner, dtype: torch.dtype = torch.float32) -> tuple[Tensor, uk.Batch]:
    logits, batch = make_case(SMALL, BY_NAME["grpo"], runner.device)
    return logits.to(dtype), batch


def operator_arguments(runner: Runner, logits: Tensor, batch: uk.Batch) -> dict[str, tuple[object, ...]]:
    row = torch.randn(batch.target.shape, device=runner.device)
    readout = ReadoutArgs(1.0, None, 1.0, None)
    program = program_args(uk.grpo(), batch, torch.float32)
    moments = rows.token_stats(logits, batch.target, readout, runner.backend).moments
    backward = (batch.target, readout, moments, RowGradients(row, None, row), logits.shape[-1], runner.backend)
    return {
        "token_stats": (logits, batch.target, readout, runner.backend),
        "token_observations": (logits, batch.target, readout, runner.backend),
        "token_stats_backward": (logits, *backward),
        "token_stats_backward_": (logits.clone(), *backward),
        "fused_loss": (logits, batch.target, readout, program, runner.backend, runner.kernel),
        "fused_loss_": (logits.clone(), batch.target, readout, program, runner.backend, runner.kernel),
        "scale_": (logits.clone(), torch.tensor(2.0, device=runner.device), runner.backend),
    }


def check_operator(name: str, runner: Runner) -> None:
    logits, batch = example(runner)
    arguments = operator_arguments(runner, logits, batch)[name]
    torch.library.opcheck(getattr(torch.ops.unirl, name).default, flat(arguments))


STATISTICS = ["token_stats", "token_observations", "token_stats_backward", "token_stats_backward_", "scale_"]


@pytest.mark.parametrize("name", STATISTICS)
def test_opcheck_of_statistics(name: str, runner: Runner) -> None:
    if runner.kernel != COMPOSED:
        pytest.skip("statistics are the same for every one-pass kernel")
    if name == "token_observations":
        runner.need_observations()
    check_operator(name, runner)


@pytest.mark.parametrize("name", ["token_stats", "fused_loss"])
def test_the_bare_operator_refuses_a_gradient(name: str) -> None:
    runner = Runner("cpu", "rows", "cpu")
    logits, batch = example(runner)
    _, *rest = operator_arguments(runner, logits, batch)[name]
    with pytest.raises(RuntimeError, match=f"{name} has no gradient of its own"):
        getattr(rows, name)(logits.requires_grad_(), *rest)


@pytest.mark.parametrize("name", ["fused_loss", "fused_loss_"])
def test_opcheck_of_losses(name: str, runner: Runner) -> None:
    if runner.kernel == COMPOSED:
        pytest.skip("the composed kernel is not an operator")
    check_operator(name, runner)


def value_and_gradient(f: object, logits: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = f(leaf, *args)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_compiles_without_a_graph_break(name: str, runner: Runner) -> None:
    """Batch built inside, metrics read inside; a new coefficient compiles nothing, new lengths once for all."""
    torch.compiler.reset()
    makers = {"grpo": lambda k: uk.grpo(beta=0.04 + k / 100), "dpo": lambda k: uk.dpo(beta=0.1)}
    if not runner.runs(BY_NAME[name]):
        pytest.skip("objectives of pair scope are composed")
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    def f(x: Tensor, target: Tensor, advantage: Tensor, old: Tensor, ref: Tensor, loss: uk.Loss) -> Tensor:
        out = uk.fused_loss(x * 1.0, uk.Batch(target, advantage, old, ref), loss, plan=runner.plan())
        return out.loss + 0 * out.metrics["entropy"]

    compiled = torch.compile(f, fullgraph=True, backend=count)
    logits, batch = example(runner)
    for k, (length, compilations) in enumerate(((7, 1), (7, 1), (5, 2), (6, 2), (4, 2))):
        target, old, ref = (x[:, :length].clone() for x in (batch.target, batch.old_logp, batch.ref_logp))
        args = (logits[:, :length].clone(), target, batch.advantage, old, ref, makers[name](k))
        for a, b in zip(value_and_gradient(compiled, *args), value_and_gradient(f, *args), strict=True):
            torch.testing.assert_close(a, b)
        # An objective that runs as plain PyTorch shows torch.compile its numbers; it generalises after the second.
        assert len(graphs) <= compilations + (runner.kernel == COMPOSED)


def test_compiles_with_inductor(device: str) -> None:
    torch.compiler.reset()
    logits, batch = make_case(SMALL, BY_NAME["grpo"], device)
    loss = uk.grpo()

    def f(x: Tensor) -> Tensor:
        return uk.fused_loss(x * 2.0, batch, loss).loss * 3.0 + uk.token_stats(x, batch.target).entropy.sum()

    got = value_and_gradient(torch.compile(f, fullgraph=True), logits)
    expected = value_and_gradient(f, logits)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("overwrite", [False, True])
def test_upstream_gradient_scales(overwrite: bool, runner: Runner) -> None:
    logits, batch = example(runner)
    plan = runner.plan(overwrite_logits=overwrite)
    results = []
    for factor in (1.0, -2.5, 0.0):
        leaf = logits.detach().requires_grad_()
        out = uk.fused_loss(leaf.clone(), batch, uk.grpo(), plan=plan)
        (out.loss * factor).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], -2.5 * results[0])
    assert not results[2].any()


def test_a_kept_graph_can_be_used_again(runner: Runner) -> None:
    logits, batch = example(runner)
    leaf = logits.detach().requires_grad_()
    value = 3 * uk.fused_loss(leaf, batch, uk.grpo(), plan=runner.plan()).loss
    first, second = (torch.autograd.grad(value, leaf, retain_graph=True)[0].clone() for _ in range(2))
    last = torch.autograd.grad(value, leaf)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, last)


def test_differentiating_twice_is_refused(runner: Runner) -> None:
    logits, batch = example(runner)
    leaf = logits.detach().requires_grad_()
    value = uk.fused_loss(leaf, batch, uk.grpo(), plan=runner.plan()).loss
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(value, leaf, create_graph=True)


def test_using_overwritten_logits_raises(runner: Runner) -> None:
    logits, batch = example(runner)
    plan = runner.plan(overwrite_logits=True)
    leaf = logits.detach().requires_grad_()
    computed = leaf * 1
    saved_by_exp = computed.exp().sum()
    saved_by_square = (computed * computed).sum()
    value = uk.fused_loss(computed, batch, uk.grpo(), plan=plan).loss
    torch.autograd.grad(value, leaf, retain_graph=True)
    with pytest.raises((RuntimeError, IndexError)):
        computed.argmax(-1)
    with pytest.raises((RuntimeError, IndexError)):
        computed[0, 0, 0]
    with pytest.raises(RuntimeError):
        saved_by_square.backward()
    if runner.kernel == COMPOSED:
        with pytest.raises(RuntimeError):
            value.backward()
    del saved_by_exp


def test_overwriting_makes_the_gradient_in_the_logits_memory(runner: Runner) -> None:
    logits, batch = example(runner)
    leaf = logits.detach().requires_grad_()
    computed = leaf * 1
    address = computed.data_ptr()
    seen = []
    computed.register_hook(lambda g: seen.append(g.data_ptr()))
    uk.fused_loss(computed, batch, uk.grpo(), plan=runner.plan(overwrite_logits=True)).loss.backward()
    assert seen == [address]


def test_no_gradient_is_computed_when_none_is_wanted(runner: Runner) -> None:
    logits, batch = example(runner)
    expected = uk.fused_loss(logits.clone().requires_grad_(), batch, uk.grpo(), plan=runner.plan())
    before = logits.clone()
    overwriting = runner.plan(overwrite_logits=True)
    with torch.no_grad():
        out = uk.fused_loss(logits.requires_grad_(), batch, uk.grpo(), plan=overwriting)
    assert not out.loss.requires_grad
    assert torch.equal(logits, before)
    torch.testing.assert_close(out.loss, expected.loss)
    with torch.inference_mode():
        torch.testing.assert_close(uk.fused_loss(before.clone(), batch, uk.grpo(), plan=runner.plan()).loss, out.loss)


def test_outputs_are_detached_and_float32(runner: Runner) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, batch = example(runner, dtype)
        out = uk.fused_loss(logits.requires_grad_(), batch, uk.grpo(), plan=runner.plan())
        assert out.loss.dtype == out.logp.dtype == out.entropy.dtype == torch.float32
        assert out.loss.shape == ()
        assert out.logp.shape == out.entropy.shape == batch.target.shape
        assert not out.logp.requires_grad
        assert not out.entropy.requires_grad
        stats = uk.token_stats(logits.detach(), batch.target, plan=runner.plan())
        torch.testing.assert_close(out.logp, stats.logp)
        torch.testing.assert_close(out.entropy, stats.entropy)


def test_autocast_and_checkpointing(runner: Runner) -> None:
    """Under autocast nothing inside is rounded; a checkpointed head gives the same gradients."""
    logits, batch = example(runner)
    weight = torch.randn(101, 101, device=runner.device) / 10

    def head(x: Tensor) -> Tensor:
        return uk.fused_loss(x @ weight, batch, uk.grpo(), plan=runner.plan()).loss

    expected = value_and_gradient(head, logits)
    checkpointed = value_and_gradient(lambda x: torch.utils.checkpoint.checkpoint(head, x, use_reentrant=False), logits)
    for a, b in zip(checkpointed, expected, strict=True):
        assert torch.equal(a, b)
    with torch.autocast(runner.device, torch.bfloat16):
        out = value_and_gradient(head, logits)
        assert out[0].dtype == torch.float32
        torch.testing.assert_close(out[0], expected[0], rtol=0.05, atol=0.05)


def test_zero_sequences(runner: Runner) -> None:
    leaf = torch.empty(0, 4, 11, device=runner.device).requires_grad_()
    batch = uk.Batch(torch.empty(0, 4, dtype=torch.int64, device=runner.device))
    out = uk.fused_loss(leaf, batch, uk.sft(), plan=runner.plan())
    (d_logits,) = torch.autograd.grad(out.loss, leaf)
    assert out.loss.item() == 0
    assert d_logits.shape == leaf.shape
