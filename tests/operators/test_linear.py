"""Linear heads as PyTorch sees them: opcheck, torch.compile, autocast, checkpointing, autograd's corner cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import unirl_kernels as uk
from tests.cases import BY_NAME, LossCase
from tests.linear import (
    CHUNKED,
    NATIVE,
    PACKED,
    RAGGED,
    SCOPES,
    WIDTH,
    CustomCase,
    LinearHead,
    budget,
    check,
    fused,
    gradients_of,
    leaves_of,
    loss_of,
    make_head,
    of,
    plan_of,
)
from tests.runners import Runner
from unirl_kernels.api.rows import program_args
from unirl_kernels.backends import COMPOSED
from unirl_kernels.backends.groups import ReadoutArgs, RowGradients
from unirl_kernels.operators import linear
from unirl_kernels.operators.declare import flat

of_native = pytest.mark.parametrize("runner", NATIVE, ids=str)


def operator_arguments(runner: Runner, head: LinearHead) -> dict[str, tuple[object, ...]]:
    hidden, weight, bias = leaves_of(head)
    operands = linear.HeadArgs(*(None if x is None else x.detach() for x in (hidden.reshape(-1, WIDTH), weight, bias)))
    target = head.batch.target
    row = torch.randn(target.shape).to(target.device)
    readout = ReadoutArgs(1.0, None, 1.0, None)
    program = program_args(uk.grpo(), head.batch, torch.float32)
    sweep = linear.SweepArgs(head.hidden.dtype, budget(head, 3, runner.backend), runner.backend)
    wanted = linear.Wanted(True, True, True)
    moments = linear.linear_token_stats(operands, target, readout, sweep).moments
    gradients = RowGradients(row, None, row)
    return {
        "linear_token_stats": (operands, target, readout, sweep),
        "linear_token_observations": (operands, target, readout, sweep),
        "linear_token_stats_backward": (operands, target, readout, moments, gradients, sweep, wanted),
        "fused_linear_loss": (operands, target, readout, program, runner.kernel, sweep, wanted),
    }


@pytest.mark.parametrize(
    "name",
    ["linear_token_stats", "linear_token_observations", "linear_token_stats_backward", "fused_linear_loss"],
)
def test_opcheck(name: str) -> None:
    """On one backend, since the fake is the same for all."""
    arguments = operator_arguments(Runner("cpu", "rows", "cpu"), make_head(RAGGED, BY_NAME["grpo"], torch.bfloat16))
    torch.library.opcheck(getattr(torch.ops.unirl, name).default, flat(arguments[name]))


def test_the_bare_operator_refuses_a_gradient() -> None:
    runner, head = Runner("cpu", "rows", "cpu"), make_head(RAGGED, BY_NAME["grpo"])
    operands, *rest = operator_arguments(runner, head)["linear_token_stats"]
    leaf = operands._replace(hidden=operands.hidden.requires_grad_())
    with pytest.raises(RuntimeError, match="linear_token_stats has no gradient of its own"):
        linear.linear_token_stats(leaf, *rest)


def cut(head: LinearHead, length: int) -> LinearHead:
    """The head with only the first ``length`` positions of each sequence."""
    whole = head.batch
    target, old_logp, ref_logp = (x[:, :length].clone() for x in (whole.target, whole.old_logp, whole.ref_logp))
    batch = uk.Batch(target, whole.advantage, old_logp, ref_logp)
    return LinearHead(head.hidden[:, :length].clone(), head.weight, head.bias, batch)


@of([runner for runner in NATIVE if runner.backend == "cpu"], SCOPES[:2])
def test_compiles_without_a_graph_break(runner: Runner, loss: LossCase) -> None:
    """Batch built inside, metrics read inside; a new coefficient compiles nothing, new lengths once for all."""
    torch.compiler.reset()
    makers = {"grpo": lambda k: uk.grpo(beta=0.04 + k / 100), "dpo": lambda k: uk.dpo(beta=0.1)}
    head = make_head(RAGGED, loss)
    plan = plan_of(runner, head, 3)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    def f(hidden: Tensor, weight: Tensor, bias: Tensor, fields: tuple[Tensor, ...], loss: uk.Loss) -> Tensor:
        out = uk.fused_linear_loss(hidden * 1.0, weight, uk.Batch(*fields), loss, bias=bias, plan=plan)
        return out.loss + 0 * out.metrics["entropy"]

    compiled = torch.compile(f, fullgraph=True, backend=count)
    for k, (length, compilations) in enumerate(((4, 1), (4, 1), (3, 2), (2, 2))):
        part = cut(head, length)
        fields = (part.batch.target, part.batch.advantage, part.batch.old_logp, part.batch.ref_logp)
        results = []
        for g in (compiled, f):
            leaves = leaves_of(part.used)
            value = g(*leaves, fields, makers[loss.name](k))
            results.append([value.detach(), *gradients_of(value, leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        # An objective that runs as plain PyTorch shows torch.compile its numbers; it generalises after the second.
        assert len(graphs) <= compilations + (runner.kernel == COMPOSED)


def test_compiles_with_inductor(device: str) -> None:
    torch.compiler.reset()
    loss, head = uk.grpo(), make_head(PACKED, BY_NAME["grpo"], device=device)

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = uk.fused_linear_loss(hidden * 2.0, weight, head.batch, loss, bias=bias)
        stats = uk.linear_token_stats(hidden, weight, head.batch.target, bias=bias)
        return out.loss * 3.0 + stats.entropy.sum() / 10

    results = []
    for g in (torch.compile(f, fullgraph=True), f):
        leaves = leaves_of(head.used)
        value = g(*leaves)
        results.append([value.detach(), *gradients_of(value, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@of(NATIVE, SCOPES)
def test_autocast(runner: Runner, loss: LossCase | CustomCase) -> None:
    """fp32 parameters, operands rounded to bf16: within the budget of fp32 on the rounded operands; the bias is not."""
    head = make_head(RAGGED, loss, device=runner.device)
    for tokens in (*CHUNKED, None):
        with torch.autocast(runner.device, torch.bfloat16):
            got = fused(head, loss.make(), plan_of(runner, head, tokens))
        rounded = LinearHead(head.hidden.bfloat16().float(), head.weight.bfloat16().float(), head.bias, head.batch)
        check(got, rounded, loss, factors=torch.bfloat16)


def test_autocast_of_statistics_and_of_the_dtype_a_model_gives(device: str) -> None:
    """Hidden states come in bf16 out of an autocast model, the parameters are fp32: gradients in the dtype of each."""
    head = make_head(RAGGED, BY_NAME["grpo"], device=device)
    leaves = [head.used.hidden.bfloat16().requires_grad_(), *leaves_of(head)[1:]]

    def value(hidden: Tensor, of_loss: bool) -> Tensor:
        _, weight, bias = leaves
        if of_loss:
            return uk.fused_linear_loss(hidden, weight, head.batch, uk.grpo(), bias=bias).loss
        return uk.linear_token_stats(hidden, weight, head.batch.target, bias=bias).entropy.mean()

    for of_loss in (True, False):
        results = []
        for hidden in (leaves[0], leaves[0].float()):
            with torch.autocast(device, torch.bfloat16):
                x = value(hidden, of_loss)
            assert x.dtype == torch.float32
            results.append(gradients_of(x, leaves))
            assert [x.dtype for x in results[-1]] == [torch.bfloat16, torch.float32, torch.float32]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("loss", SCOPES, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(loss: LossCase | CustomCase, reentrant: bool, device: str) -> None:
    head = make_head(RAGGED, loss, device=device)
    for tokens in CHUNKED:
        leaves = leaves_of(head.used)
        value = 3 * checkpoint(lambda *x, n=tokens: loss_of(head, x, loss, n), *leaves, use_reentrant=reentrant)
        value.backward()
        plain = leaves_of(head.used)
        (3 * loss_of(head, plain, loss, tokens)).backward()
        for a, b in zip(leaves, plain, strict=True):
            assert torch.equal(a.grad, b.grad)


@of_native
def test_outputs_are_detached_float32_and_those_of_the_formed_logits(runner: Runner) -> None:
    for shape in (RAGGED, PACKED):
        head = make_head(shape, BY_NAME["dpo"], device=runner.device)
        loss = uk.dpo() if runner.kernel == COMPOSED else uk.grpo()
        hidden, weight, bias = head.used.operands
        expected = uk.fused_loss(hidden @ weight.t() + bias, head.batch, loss)
        for dtype in (torch.float32, torch.bfloat16):
            leaf = hidden.to(dtype).requires_grad_()
            for tokens in CHUNKED:
                plan = plan_of(runner, head, tokens)
                out = uk.fused_linear_loss(leaf, weight.to(dtype), head.batch, loss, bias=bias.to(dtype), plan=plan)
                assert out.loss.dtype == out.logp.dtype == out.entropy.dtype == torch.float32
                assert out.loss.requires_grad
                assert out.loss.shape == ()
                assert not out.logp.requires_grad
                assert not out.entropy.requires_grad
                assert out.logp.shape == out.entropy.shape == head.batch.target.shape
                assert out.metrics.keys() == expected.metrics.keys()
                if dtype == torch.float32:
                    torch.testing.assert_close(out.logp, expected.logp)
                    torch.testing.assert_close(out.entropy, expected.entropy)
                    for name, x in out.metrics.items():
                        torch.testing.assert_close(x, expected.metrics[name])
