"""Loss and gradients of linear heads against the fp64 oracle, wherever chunks are cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME, LossCase, Shape
from tests.linear import (
    DTYPES,
    LOSSES,
    NATIVE,
    NOTHING,
    PACKED,
    RAGGED,
    SEQUENCE_SCOPE,
    CustomCase,
    LinearHead,
    check,
    ends_of,
    fused,
    given,
    make_head,
    of,
    plan_of,
)
from tests.runners import RUNNERS, Runner
from unirl_kernels.backends import COMPOSED, load
from unirl_kernels.head import by_units
from unirl_kernels.objectives import Tokens
from unirl_kernels.testing import oracle

CHUNKS = (1, 2, 3, 4, 5, 7, None)
"""Tokens per chunk of the 8 valid ones, in sequences of 3, 1, 0 and 4: borders in sequences (1, 2, 3), at the end of
one (4); pairs of 3 and 5 tokens, too long for a chunk (1 to 4), each in one of its own (5, 7), both in one (None)."""

ALL = [*LOSSES, SEQUENCE_SCOPE]
INTERPRETED = [runner for runner in RUNNERS if runner.interpreted]
READOUTS = {
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.25},
    "everything": {"temperature": 1.3, "softcap": 5.0, "scale": 0.5},
}


def run(
    runner: Runner,
    loss: LossCase | CustomCase,
    shape: Shape,
    tokens: int | None,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    **readout: float | Tensor,
) -> None:
    head = make_head(shape, loss, dtype, runner.device, bias=bias)
    got = fused(head, loss.make(), plan_of(runner, head, tokens), uk.Readout(**readout))
    check(got, head, loss, **readout)


@pytest.mark.parametrize("shape", [RAGGED, PACKED], ids=str)
@of(NATIVE, ALL)
def test_loss_and_gradients(runner: Runner, loss: LossCase | CustomCase, shape: Shape) -> None:
    for tokens in CHUNKS:
        run(runner, loss, shape, tokens)
    run(runner, loss, shape, 3, bias=False)


@pytest.mark.parametrize("runner", INTERPRETED, ids=str)
def test_under_the_interpreter(runner: Runner) -> None:
    if runner.kernel != COMPOSED:
        run(runner, BY_NAME["grpo"], RAGGED, 3)
        return
    run(runner, BY_NAME["dpo"], PACKED, 5, torch.bfloat16)


def test_chunks_end_where_they_are_said_to() -> None:
    """``CHUNKS`` relies on these ends of sequences and chunks."""
    batch = make_head(RAGGED, BY_NAME["dpo"]).batch
    assert ends_of(batch) == [3, 4, 4, 8]
    sizes = {most: by_units(batch, "token", most) for most in (1, 2, 3, 4, 5, 7, 8)}
    assert {most: [group.chunk.n for group in groups] for most, groups in sizes.items()} == {
        1: [1] * 8,
        2: [2] * 4,
        3: [2, 3, 3],
        4: [4, 4],
        5: [4, 4],
        7: [4, 4],
        8: [8],
    }
    pairs = {most: by_units(batch, "pair", most) for most in (4, 5, 7, 8)}
    assert pairs[4] is None
    assert [[group.chunk.n for group in pairs[most]] for most in (5, 7, 8)] == [[3, 5], [3, 5], [8]]
    assert [group.chunk.n for group in by_units(batch, "sequence", 4)] == [4, 4]
    assert by_units(batch, "sequence", 3) is None


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@of(NATIVE, [BY_NAME[name] for name in ("sft", "grpo", "dpo")])
def test_16_bit_operands(runner: Runner, loss: LossCase, dtype: torch.dtype) -> None:
    for shape, tokens in ((RAGGED, 3), (PACKED, None), (RAGGED, 5)):
        run(runner, loss, shape, tokens, dtype)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_readouts(runner: Runner, readout: str) -> None:
    loss = BY_NAME["dpo"] if runner.kernel == COMPOSED else BY_NAME["grpo"]
    for tokens in (3, 5):
        run(runner, loss, RAGGED, tokens, **READOUTS[readout])


@pytest.mark.parametrize("shape", [RAGGED, PACKED], ids=str)
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_temperature_per_token(runner: Runner, shape: Shape) -> None:
    loss = BY_NAME["dpo"] if runner.kernel == COMPOSED else BY_NAME["grpo"]
    target = make_head(shape, loss).batch.target
    temperature = (0.5 + torch.rand(target.shape)).to(runner.device)
    for tokens in (3, 5, None):
        run(runner, loss, shape, tokens, temperature=temperature, softcap=8.0)


def entropy_and_lse(t: Tokens) -> Tensor:
    return torch.erf(t.logp - t.old_logp) * t.advantage - 0.1 * t.entropy + 0.01 * t.lse


def entropy_and_lse_of(logits: Tensor, batch: uk.Batch) -> Tensor:
    logp, entropy = (f.reshape(-1) for f in (oracle.log_probs(logits, batch.target), oracle.entropy(logits)))
    lse, old = torch.logsumexp(logits, -1).reshape(-1), batch.old_logp.reshape(-1)
    tokens = oracle.sequences(batch)
    total = logp.new_zeros(())
    for o, advantage in zip(tokens, batch.advantage, strict=True):
        if len(o):
            total = total + (torch.erf(logp[o] - old[o]) * advantage - 0.1 * entropy[o] + 0.01 * lse[o]).sum() / 8
    return total


@pytest.mark.parametrize("tokens", CHUNKS)
def test_an_objective_that_only_runs_composed(tokens: int | None) -> None:
    """An objective of token scope that cannot be traced. Gradients flow through entropy and lse."""
    loss = uk.Loss(entropy_and_lse, uk.TokenMean())
    case = CustomCase("erf", lambda: loss, entropy_and_lse_of)
    head = make_head(RAGGED, case)
    with pytest.raises(uk.UnsupportedOperation):
        fused(head, loss)
    for runner in NATIVE:
        if runner.kernel == COMPOSED and not runner.emulated:
            head = make_head(RAGGED, case, device=runner.device)
            check(fused(head, loss, plan_of(runner, head, tokens)), head, case)


@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_on_policy_and_advantages_per_token(runner: Runner) -> None:
    loss = BY_NAME["grpo"]
    head = make_head(PACKED, loss, device=runner.device)
    of = given(head.batch) | {"old_logp": None, "advantage": torch.randn(head.batch.target.shape).to(runner.device)}
    batch = uk.Batch(**of)
    head = LinearHead(head.hidden, head.weight, head.bias, batch)
    for tokens in (1, 3, None):
        check(fused(head, loss.make(), plan_of(runner, head, tokens)), head, loss)


@of(RUNNERS, [BY_NAME["grpo"], BY_NAME["dpo"], SEQUENCE_SCOPE])
def test_nothing_but_ignored_tokens(runner: Runner, loss: LossCase | CustomCase) -> None:
    """Loss 0, of DPO log 2; gradients of exactly zero; hidden states of garbage are not read."""
    head = make_head(NOTHING, loss, device=runner.device)
    for tokens in (1, None):
        got = fused(head, loss.make(), plan_of(runner, head, tokens))
        assert got.loss.item() == pytest.approx(math.log(2) if loss.name == "dpo" else 0.0, rel=1e-6)
        for gradient, operand in zip(got[1:4], head.operands, strict=True):
            assert gradient.shape == operand.shape
            assert not gradient.any()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_no_places_at_all(runner: Runner, shape: tuple[int, int]) -> None:
    on = {"device": runner.device}
    batch = uk.Batch(torch.empty(shape, dtype=torch.int64, **on))
    head = LinearHead(torch.empty(*shape, 4, **on), torch.randn(7, 4, **on), torch.randn(7, **on), batch)
    got = fused(head, uk.sft(), runner.plan())
    assert got.loss.item() == 0
    assert [x.shape for x in got[1:4]] == [x.shape for x in head.operands]
    assert not any(x.any() for x in got[1:4])


def test_not_a_number_of_a_valid_token_is_visible() -> None:
    """As in ``fused_loss``, the loss is NaN. Statistics and d_hidden of other tokens do not change."""
    head = make_head(RAGGED, BY_NAME["grpo"])
    clean = fused(head, uk.grpo())
    hidden = head.hidden.clone()
    hidden[3, 1] = float("nan")
    got = fused(LinearHead(hidden, head.weight, head.bias, head.batch), uk.grpo())
    assert got.loss.isnan()
    assert got.d_weight.isnan().all()
    others = torch.ones(head.batch.target.shape, dtype=torch.bool)
    others[3, 1] = False
    for name in ("d_hidden", "logp", "entropy"):
        assert getattr(got, name)[3, 1].isnan().all()
        torch.testing.assert_close(getattr(got, name)[others], getattr(clean, name)[others])


@of(NATIVE, [BY_NAME["grpo"], BY_NAME["dpo"]])
def test_gradcheck(runner: Runner, loss: LossCase) -> None:
    """fp64 heads run the same kernels in fp64: analytic against numeric gradients, chunks of all sizes."""
    runner.need(torch.float64)
    target = torch.tensor([[0, uk.IGNORE, 4], [2, 3, uk.IGNORE]])
    # Finite differences would move old_logp, too, if it were None.
    fields = (target, torch.tensor([1.0, -0.5]), -2 * torch.rand(2, 3), -2 * torch.rand(2, 3))
    batch = uk.Batch(*(x.to(runner.device) for x in fields))
    wide = {"dtype": torch.float64, "device": runner.device}
    operands = [torch.randn(*shape, **wide).requires_grad_() for shape in ((2, 3, 3), (5, 3), (5,))]
    row_bytes = load(runner.backend).matmuls(operands[1], torch.float64).row_bytes
    for tokens in (1, 3, 4):
        plan = uk.Plan(runner.backend, runner.kernel, max_chunk_bytes=tokens * row_bytes)

        def value(hidden: Tensor, weight: Tensor, bias: Tensor, plan: uk.Plan = plan) -> Tensor:
            readout = uk.Readout(temperature=1.3, softcap=5.0)
            return uk.fused_linear_loss(hidden, weight, batch, loss.make(), bias=bias, readout=readout, plan=plan).loss

        assert torch.autograd.gradcheck(value, operands)
