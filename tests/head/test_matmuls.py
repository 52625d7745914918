"""The matmuls of a linear head: their number, their results on each kind of device, and their memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from benchmarks.measure import peak_extra_bytes
from tests.cases import BY_NAME
from tests.linear import (
    NATIVE,
    NOTHING,
    PACKED,
    RAGGED,
    SEQUENCE_SCOPE,
    Wrapped,
    budget,
    changed_matmuls,
    check,
    counted,
    fused,
    gradients_of,
    leaves_of,
    make_head,
)
from tests.runners import RUNNERS, Runner
from unirl_kernels.backends import COMPOSED, load
from unirl_kernels.backends import matmuls as matmuls_module
from unirl_kernels.backends.groups import ReadoutArgs
from unirl_kernels.backends.matmuls import Halved, Mixed, Widened
from unirl_kernels.head.sizes import Shape, sizes_of
from unirl_kernels.head.statistics import moments_in_chunks
from unirl_kernels.head.sweep import Head, sweep_chunks
from unirl_kernels.operators.linear import Wanted
from unirl_kernels.operators.shards import Tiles

CPU = torch.device("cpu")
MIB = 2**20
BACKENDS = [runner for runner in NATIVE if runner.kernel == COMPOSED]
"""Matmuls are the same for every kernel."""
of_backends = pytest.mark.parametrize("runner", BACKENDS, ids=str)

VALID, VOCAB = 8, 37
"""Valid tokens and vocabulary of ``RAGGED`` and ``PACKED``; the other tokens are ignored."""


@of_backends
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("tokens", [1, 3, None])
def test_one_pass_takes_three_matmuls_and_fewer_where_something_is_frozen(
    runner: Runner, frozen: Sequence[str], tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head(RAGGED, BY_NAME["grpo"], device=runner.device)
    everything = fused(head, uk.grpo())
    plan = uk.Plan(runner.backend, max_chunk_bytes=budget(head, tokens, runner.backend))
    with counted(monkeypatch, runner.backend) as count:
        got = fused(head, uk.grpo(), plan, frozen=frozen)
    assert count.matmuls(VALID * VOCAB) == {
        "logits": 1,
        "d_hidden": "hidden" not in frozen,
        "add_d_weight": "weight" not in frozen,
    }
    for name, a, b in zip(("hidden", "weight", "bias"), got[1:4], everything[1:4], strict=True):
        assert (a is None) == (name in frozen)
        if a is not None:
            torch.testing.assert_close(a, b)


@of_backends
@pytest.mark.parametrize(("tokens", "forwards"), [(None, 1), (5, 1), (4, 2), (1, 2)])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",)])
def test_pairs_that_fit_a_chunk_take_three_matmuls_and_others_four(
    runner: Runner, tokens: int | None, forwards: int, frozen: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest pair has 5 tokens."""
    head = make_head(PACKED, BY_NAME["dpo"], device=runner.device)
    plan = uk.Plan(runner.backend, max_chunk_bytes=budget(head, tokens, runner.backend))
    with counted(monkeypatch, runner.backend) as count:
        fused(head, uk.dpo(), plan, frozen=frozen)
    assert count.matmuls(VALID * VOCAB) == {
        "logits": forwards,
        "d_hidden": "hidden" not in frozen,
        "add_d_weight": "weight" not in frozen,
    }


@of_backends
@pytest.mark.parametrize(("tokens", "forwards"), [(4, 1), (3, 2)])
def test_sequences_that_fit_a_chunk(
    runner: Runner, tokens: int, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head(RAGGED, SEQUENCE_SCOPE, device=runner.device)
    with counted(monkeypatch, runner.backend) as count:
        fused(
            head, SEQUENCE_SCOPE.make(), uk.Plan(runner.backend, max_chunk_bytes=budget(head, tokens, runner.backend))
        )
    assert count.matmuls(VALID * VOCAB) == {"logits": forwards, "d_hidden": 1, "add_d_weight": 1}


@of_backends
@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_nothing_but_the_logits_where_no_gradient_is_wanted(
    runner: Runner, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head(RAGGED, BY_NAME[name], device=runner.device)
    hidden, weight, bias = leaves_of(head)
    expected = fused(head, BY_NAME[name].make()).loss

    def loss() -> Tensor:
        return uk.fused_linear_loss(
            hidden, weight, head.batch, BY_NAME[name].make(), bias=bias, plan=uk.Plan(runner.backend)
        ).loss

    with counted(monkeypatch, runner.backend) as count:
        with torch.no_grad():
            values = [loss()]
        with torch.inference_mode():
            values.append(loss())
        for x in (hidden, weight, bias):
            x.requires_grad_(False)
        values.append(loss())
    assert count.matmuls(VALID * VOCAB) == {"logits": 3, "d_hidden": 0, "add_d_weight": 0}
    for value in values:
        assert not value.requires_grad
        torch.testing.assert_close(value, expected)


@of_backends
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",)])
def test_statistics_take_one_product_and_their_gradients_what_is_wanted(
    runner: Runner, frozen: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head(RAGGED, BY_NAME["sft"], device=runner.device)
    hidden, weight, bias = leaves = leaves_of(head, frozen)
    plan = uk.Plan(runner.backend, max_chunk_bytes=budget(head, 3, runner.backend))
    with counted(monkeypatch, runner.backend) as count:
        stats = uk.linear_token_stats(hidden, weight, head.batch.target, bias=bias, plan=plan)
        assert count.matmuls(VALID * VOCAB) == {"logits": 1, "d_hidden": 0, "add_d_weight": 0}
        gradients_of(stats.logp.sum(), leaves)
    assert count.matmuls(VALID * VOCAB) == {
        "logits": 2,
        "d_hidden": "hidden" not in frozen,
        "add_d_weight": "weight" not in frozen,
    }


@of_backends
def test_ignored_tokens_are_not_multiplied(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch, runner.backend) as count:
        fused(make_head(NOTHING, BY_NAME["grpo"], device=runner.device), uk.grpo(), uk.Plan(runner.backend))
    assert count.matmuls(1) == {"logits": 0, "d_hidden": 0, "add_d_weight": 0}


@of_backends
def test_gradients_that_nobody_wants_have_no_memory(runner: Runner) -> None:
    head = make_head(PACKED, BY_NAME["sft"], device=runner.device)
    operands = Head(*head.operands, torch.float32, runner.backend)
    gradients = sweep_chunks(operands, [], lambda logits, d_logits, chunk: None, Wanted(False, False, False))
    assert [x.numel() for x in gradients] == [0, 0, 0]


# Matmuls of devices that multiply 16-bit operands into fp32, which a CPU does not.


@pytest.fixture
def _mixed_matmuls_on_the_cpu() -> Iterator[None]:
    """The overloads with ``out_dtype``, which PyTorch has for CUDA alone, for the CPU as well: operands are widened."""
    library = torch.library.Library("aten", "IMPL", "CPU")

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype != out_dtype
        return torch.mm(a.to(out_dtype), b.to(out_dtype))

    def addmm(
        total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        assert a.dtype == b.dtype != out_dtype
        return torch.addmm(total.to(out_dtype), a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha)

    def mm_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(mm(a, b, out_dtype))

    def addmm_out(
        total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor, **factors: float
    ) -> Tensor:
        return out.copy_(addmm(total, a, b, out_dtype, **factors))

    for name, f in (("mm.dtype", mm), ("mm.dtype_out", mm_out), ("addmm.dtype", addmm), ("addmm.dtype_out", addmm_out)):
        library.impl(name, f)
    yield
    library._destroy()


def exact(*shape: int, dtype: torch.dtype) -> Tensor:
    """Numbers whose matmuls and sums fp32 holds without rounding."""
    return (torch.randint(-8, 9, shape) / 8).to(dtype)


@pytest.mark.usefixtures("_mixed_matmuls_on_the_cpu")
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
def test_matmuls_into_fp32(bias: torch.dtype | None) -> None:
    weight, hidden = exact(33, 6, dtype=torch.bfloat16), exact(5, 6, dtype=torch.bfloat16)
    matmuls = Mixed(weight)
    assert matmuls.row_bytes == 33 * 4 + 40 * 2
    added = None if bias is None else exact(33, dtype=bias)
    logits = torch.full((5, 33), torch.nan)
    matmuls.logits(hidden, added, logits)
    expected = hidden.double() @ weight.double().t() + (0 if added is None else added.double())
    assert torch.equal(logits.double(), expected)

    d_logits = matmuls.gradient_buffer(logits, 5).copy_(exact(5, 33, dtype=torch.float32))
    assert d_logits.dtype == torch.bfloat16
    assert d_logits.stride() == (40, 1)
    d_hidden = matmuls.d_hidden(d_logits)
    assert d_hidden.dtype == torch.float32
    assert torch.equal(d_hidden.double(), d_logits.double() @ weight.double())

    total = torch.full((33, 6), torch.nan)
    one = d_logits.double().t() @ hidden.double()
    matmuls.add_d_weight(d_logits, hidden, total, first=True)
    assert torch.equal(total.double(), one)
    matmuls.add_d_weight(d_logits, hidden, total, first=False)
    assert torch.equal(total.double(), 2 * one)


@pytest.mark.usefixtures("_mixed_matmuls_on_the_cpu")
@pytest.mark.parametrize("name", ["grpo", "dpo"])
@pytest.mark.parametrize("runner", [p for p in RUNNERS if p.kernel == COMPOSED and p.backend != "cpu"], ids=str)
def test_matmuls_into_fp32_round_the_gradient_and_nothing_else(
    runner: Runner, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head on them: loss, logp and entropy within the fp32 budget; gradients as if d_logits were rounded once."""
    loss = BY_NAME[name]
    head = make_head(RAGGED, loss, torch.bfloat16, runner.device)
    plan = uk.Plan(runner.backend, max_chunk_bytes=5 * Mixed(head.weight).row_bytes)

    class RoundedOnce(Wrapped):
        gradient_bytes = 2

        def gradient_buffer(self, logits: Tensor, rows: int) -> Tensor:
            return logits.new_empty(rows, logits.shape[1], dtype=torch.bfloat16)

        def d_hidden(self, d_logits: Tensor) -> Tensor:
            return self.matmuls.d_hidden(d_logits.float())

        def add_d_weight(self, d_logits: Tensor, *args: Any, **kwargs: Any) -> None:
            self.matmuls.add_d_weight(d_logits.float(), *args, **kwargs)

    with changed_matmuls(monkeypatch, runner.backend, lambda _: Mixed(head.weight)):
        got = fused(head, loss.make(), plan)
    with changed_matmuls(monkeypatch, runner.backend, lambda _: RoundedOnce(Widened(head.weight, torch.bfloat16))):
        expected = fused(head, loss.make(), plan)
    check(got._replace(d_hidden=None, d_weight=None, d_bias=None), head, loss)
    for a, b in zip(got[1:4], expected[1:4], strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("_mixed_matmuls_on_the_cpu")
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("tokens", "groups", "waves"), [(700, 2, 2), (200, 1, 2), (200, 1, 1)])
def test_two_sizes_of_chunks(
    tokens: int, groups: int, waves: int, ignored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits in chunks of 128, gradients in groups of up to 512: those of all logits at once, but for their rounding.

    A group that holds all tokens makes d_weight by one matmul into bf16, if that has more than one wave of tiles.
    Another adds to fp32.
    """
    monkeypatch.setattr("unirl_kernels.head.sweep.waves", lambda *_: waves)
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    target = torch.randint(0, 40, (tokens,))
    if ignored:
        target[::7] = uk.IGNORE
    batch = uk.Batch(target, cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32))
    plan = uk.Plan("eager", max_chunk_bytes=128 * 160 * 3)
    sizes: list[int] = []

    class Seen(Wrapped):
        def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
            sizes.append(len(out))
            self.matmuls.logits(hidden, bias, out)

        def add_d_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
            sizes.append(-len(d_logits))
            assert total.dtype == (torch.bfloat16 if waves > groups else torch.float32)
            self.matmuls.add_d_weight(d_logits, hidden, total, first)

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    with changed_matmuls(monkeypatch, "eager", lambda _: Seen(Mixed(leaves[1].detach()))):
        uk.fused_linear_loss(*leaves, batch, uk.sft(), plan=plan).loss.backward()
    counted = int((target != uk.IGNORE).sum())
    assert max(sizes) == 128
    assert sum(n for n in sizes if n > 0) == -sum(n for n in sizes if n < 0) == counted
    assert len([n for n in sizes if n < 0]) == groups

    logits = hidden.float() @ weight.float().t()
    d_logits = torch.softmax(logits, -1) - torch.nn.functional.one_hot(target.clamp(min=0), 40)
    d_logits = (d_logits * (target != uk.IGNORE).unsqueeze(-1) / counted).bfloat16().float()
    for leaf, exact_gradient in zip(leaves, (d_logits @ weight.float(), d_logits.t() @ hidden.float()), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, exact_gradient.bfloat16())


@pytest.mark.usefixtures("_mixed_matmuls_on_the_cpu")
def test_a_shard_is_measured_in_the_chunks_of_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matmuls of other sizes round differently, so both use matmuls of the same sizes."""
    operands = torch.randn(700, 16).bfloat16(), torch.randn(40, 16).bfloat16(), None
    head = Head(*operands, torch.bfloat16, "eager", max_chunk_bytes=128 * 160 * 3)
    target, sizes = torch.randint(0, 40, (1, 700)), []

    class Seen(Wrapped):
        def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
            sizes.append(len(out))
            self.matmuls.logits(hidden, bias, out)

    with changed_matmuls(monkeypatch, "eager", lambda _: Seen(Mixed(head.weight))):
        moments_in_chunks(head, target, ReadoutArgs(1.0, None, 1.0, None), Tiles(40, 1))
        groups = head.groups(target)
    assert sizes == [chunk.n for group in groups for chunk in group]
    assert max(sizes) == 128


@pytest.mark.usefixtures("_mixed_matmuls_on_the_cpu")
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16], ids=str)
def test_matmuls_of_fp16(bias: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of any size that fp32 has, within 2^-15 of the sum of the magnitudes; more than one slice."""
    monkeypatch.setattr(matmuls_module, "SLICES_OF_HALVES_BYTES", 1)
    torch.manual_seed(0)
    weight, hidden = torch.randn(300, 6).half(), torch.randn(5, 6).half()
    matmuls = Halved(weight)
    assert len(list(matmuls._slices())) == 3
    added = None if bias is None else torch.randn(300).to(bias)
    logits = torch.full((5, 300), torch.nan)
    matmuls.logits(hidden, added, logits)
    expected = hidden.double() @ weight.double().t() + (0 if added is None else added.double())
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=20 * 2**-24 * expected.abs().max().item())

    d_logits = matmuls.gradient_buffer(logits, 5).copy_(
        torch.randn(5, 300) * 10.0 ** torch.arange(-30, 20, 10)[:, None]
    )

    def close(found: Tensor, left: Tensor, right: Tensor) -> None:
        magnitude = left.double().abs() @ right.double().abs()
        assert found.dtype == torch.float32
        assert ((found.double() - left.double() @ right.double()).abs() <= 2**-15 * magnitude).all()

    close(matmuls.d_hidden(d_logits), d_logits, weight)
    total = torch.full((300, 6), torch.nan)
    matmuls.add_d_weight(d_logits, hidden, total, first=True)
    close(total, d_logits.t(), hidden)
    matmuls.add_d_weight(d_logits, hidden, total, first=False)
    close(total, 2 * d_logits.t(), hidden)


@pytest.mark.usefixtures("_mixed_matmuls_on_the_cpu")
@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_heads_of_fp16_on_halves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = BY_NAME[name]
    head = make_head(RAGGED, loss, torch.float16)
    with changed_matmuls(monkeypatch, "eager", lambda _: Halved(head.weight)):
        check(fused(head, loss.make(), uk.Plan("eager")), head, loss)


@pytest.mark.parametrize("d", [2048, 4096])
@pytest.mark.parametrize("vocab", [32000, 50257, 131072, 152064, 262208])
def test_sizes_fit_the_memory(vocab: int, d: int) -> None:
    """Multiples of 128, the chunk within a group, and one group where the memory holds it."""
    for memory in (128 * 4 * vocab - 1, 3 * 128 * 4 * vocab, 2**31, 11 * 2**28):
        for tokens in (0, 1, 128, 5000, 8192, 16384):
            sizes = sizes_of(Shape(tokens, vocab, d, 4 * vocab, 2 * vocab, memory, 132))
            if sizes is None:
                assert memory < 3 * 128 * 4 * vocab
                continue
            assert sizes.chunk * 4 * vocab + sizes.group * 2 * vocab <= memory
            assert sizes.chunk % 128 == sizes.group % 128 == 0
            assert sizes.group >= sizes.chunk
            least = min(512, memory // 3 // (4 * vocab) // 128 * 128) * 4 * vocab
            most = (memory - least) // (2 * vocab) // 128 * 128
            assert sizes.group >= min(tokens, most // 2)


# Memory


def peak_of(tokens: int, chunk: int, dtype: torch.dtype = torch.float32) -> int:
    vocab, d = 8192, 64
    hidden, weight = torch.randn(tokens, d).to(dtype), torch.randn(vocab, d).to(dtype)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
    batch = uk.Batch(torch.randint(0, vocab, (tokens,)), cu_seqlens=cu_seqlens)
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def call() -> None:
        out = uk.fused_linear_loss(*leaves, batch, uk.sft(), plan=uk.Plan(max_chunk_bytes=chunk))
        torch.autograd.grad(out.loss, leaves)

    return peak_extra_bytes(call, CPU, prepare=load("cpu").release_memory, repeats=2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_memory_is_that_of_a_chunk_and_the_gradients_whatever_the_batch() -> None:
    """Logits of 4096 tokens are 128 MiB; the gradients of hidden states and weight 3 MiB and less."""
    chunk = 32 * MIB
    peaks = {tokens: peak_of(tokens, chunk) for tokens in (1024, 4096)}
    for tokens, peak in peaks.items():
        gradients = 4 * 64 * (8192 + tokens)
        # Of the chunk: its hidden states and their gradient, and what the multiplication packs for itself.
        assert 0.9 * chunk < peak < chunk + gradients + 10 * MIB, f"{tokens} tokens"
    assert abs(peaks[4096] - peaks[1024]) < 8 * MIB
    assert peak_of(4096, 4 * chunk) > 3.5 * chunk  # the measure sees logits where they are
