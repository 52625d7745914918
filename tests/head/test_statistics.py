"""``linear_token_stats``: statistics merged from tiles of the vocabulary, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME
from tests.linear import (
    DTYPES,
    PACKED,
    RAGGED,
    LinearHead,
    Result,
    budget,
    check_gradients,
    chosen_plan,
    gradients_of,
    leaves_of,
    logits_of,
    make_head,
)
from tests.runners import RUNNERS, Runner
from unirl_kernels.backends import COMPOSED, load
from unirl_kernels.backends.groups import ReadoutArgs
from unirl_kernels.head import chunks, statistics
from unirl_kernels.head.statistics import measured_in_tiles, observed_in_tiles
from unirl_kernels.head.sweep import Head
from unirl_kernels.operators.declare import flat
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations

BACKENDS = [runner for runner in RUNNERS if runner.kernel == COMPOSED]
"""Statistics are the same for every one-pass kernel."""

NATIVE = [runner for runner in BACKENDS if not runner.interpreted]
TILES = {"one": (1024, None), "two": (8, 4), "ten": (8, 1), "one_column": (1024, 1), "few_tokens": (3, 1)}
"""Tokens of a tile, and tokens whose whole rows would fit its memory."""

READOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"temperature": 1.3, "softcap": 5.0, "scale": 0.5},
}


def plan_of(head: LinearHead, runner: Runner, tiles: str, monkeypatch: pytest.MonkeyPatch) -> uk.Plan:
    tokens, rows = TILES[tiles]
    monkeypatch.setattr("unirl_kernels.head.statistics.TOKENS_OF_TILE", tokens)
    return uk.Plan(runner.backend, max_chunk_bytes=budget(head, rows, runner.backend))


def stats_of(head: LinearHead, plan: uk.Plan, readout: uk.Readout = uk.Readout()) -> uk.TokenStats:
    hidden, weight, bias = head.operands
    return uk.linear_token_stats(hidden, weight, head.batch.target, bias=bias, readout=readout, plan=plan)


def by_oracle(head: LinearHead, readout: dict[str, Any], factors: torch.dtype = torch.float32) -> uk.TokenStats:
    """In the dtype of the head, zero at ignored positions."""
    z, target = oracle.apply_readout(logits_of(*head.operands, factors), **readout), head.batch.target
    values = (oracle.log_probs(z, target), oracle.entropy(z), torch.logsumexp(z, -1))
    return uk.TokenStats(*(torch.where(target != uk.IGNORE, x, 0) for x in values))


def with_gradients(head: LinearHead, stats_of_leaves: Any, weights: Tensor) -> tuple[uk.TokenStats, Result]:
    leaves = leaves_of(head)
    stats = stats_of_leaves(LinearHead(*leaves, head.batch))
    value = sum((s * w.to(s.dtype)).sum() for s, w in zip(stats, weights, strict=True))
    gradients = gradients_of(value, leaves)
    stats = uk.TokenStats(*(x.detach() for x in stats))
    return stats, Result(value.detach(), *gradients, stats.logp, stats.entropy)


def compare(head: LinearHead, plan: uk.Plan, **readout: Any) -> None:
    """Statistics without and with a gradient, and the gradients of a random combination of all three."""
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in readout.items()}
    weights = torch.randn(3, *head.batch.target.shape).to(head.hidden.device)
    truth, d_truth = with_gradients(head.used.to(torch.float64), lambda x: by_oracle(x, exact), weights)
    plain, d_plain = with_gradients(head.used.to(torch.float32), lambda x: by_oracle(x, readout), weights)
    got, d_got = with_gradients(head, lambda x: stats_of(x, plan, uk.Readout(**readout)), weights)
    for a, b in zip(got, stats_of(head, plan, uk.Readout(**readout)), strict=True):
        assert torch.equal(a, b), "statistics depend on whether a gradient is wanted"
    lse = max(1.0, truth.lse.abs().max().item())
    for name, g, p, t in zip(got._fields, got, plain, truth, strict=True):
        assert g.dtype == torch.float32
        assert not (problems := violations(g, p, t, condition=condition_of(t, lse))), f"{name}: {problems}"
        assert not g[~head.batch.valid].any()
    dtype = head.hidden.dtype
    _, d_rounded = with_gradients(head.used.to(torch.float32), lambda x: by_oracle(x, readout, dtype), weights)
    check_gradients(d_got, [d_plain, d_rounded], d_truth, head, condition=2 * lse)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_statistics_and_gradients(runner: Runner, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in (RAGGED, PACKED):
        for dtype in DTYPES:
            for readout in READOUTS.values():
                head = make_head(shape, BY_NAME["sft"], dtype, runner.device)
                compare(head, plan_of(head, runner, tiles, monkeypatch), **readout)
    head = make_head(RAGGED, BY_NAME["sft"], device=runner.device, bias=False)
    temperature = (0.5 + torch.rand(head.batch.target.shape)).to(runner.device)
    compare(head, plan_of(head, runner, tiles, monkeypatch), temperature=temperature)


def test_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for runner in BACKENDS:
        if runner.interpreted:
            head = make_head(RAGGED, BY_NAME["sft"], torch.bfloat16, runner.device)
            compare(head, plan_of(head, runner, "two", monkeypatch), temperature=0.7)


def test_tiles_are_as_wide_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """``COLUMNS_OF_TILE``, which other tests use, is the width of a tile."""
    seen: list[tuple[int, ...]] = []
    matmuls = load("cpu").matmuls

    def spy(weight: Tensor, dtype: torch.dtype) -> object:
        seen.append(tuple(weight.shape))
        return matmuls(weight, dtype)

    head = make_head(RAGGED, BY_NAME["sft"])
    runner = next(p for p in NATIVE if p.backend == "cpu")
    widths = {}
    for tiles in TILES:
        plan = plan_of(head, runner, tiles, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(load("cpu"), "matmuls", spy)
            seen.clear()
            stats_of(head, plan)
        # A bound on memory is first held against what a row takes, by one column of the weight.
        widths[tiles] = [shape[0] for shape in seen[plan.max_chunk_bytes is not None :]]
    assert widths == {
        "one": [37],
        "two": [18, 18, 1],
        "ten": [4] * 9 + [1],
        "one_column": [1] * 37,
        "few_tokens": [12, 12, 12, 1],
    }


def test_little_memory_makes_few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results for all tiles are kept: as many as columns would take more memory than all logits."""
    monkeypatch.setattr("unirl_kernels.head.statistics.LEAST_COLUMNS", 1024)
    hidden, weight, target = torch.randn(6, 4), torch.randn(3000, 4), torch.arange(6)
    expected = uk.token_stats(hidden @ weight.t(), target)
    least = load("cpu").matmuls(weight, torch.float32).row_bytes
    calls: list[int] = []
    measure = load("cpu").token_stats
    monkeypatch.setattr(load("cpu"), "token_stats", lambda x, *rest: calls.append(x.numel()) or measure(x, *rest))
    stats = uk.linear_token_stats(hidden, weight, target, plan=uk.Plan("cpu", max_chunk_bytes=least))
    assert max(calls) <= least // 4
    assert len(calls) == 3 * 3  # of 1024 columns, two tokens each
    torch.testing.assert_close(stats.logp, expected.logp)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_targets_in_every_tile(runner: Runner, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(RAGGED, BY_NAME["sft"], device=runner.device)
    hidden = torch.randn(1, *head.weight.shape).to(runner.device)
    target = torch.arange(len(head.weight), device=runner.device).unsqueeze(0)
    head = LinearHead(hidden, head.weight, head.bias, uk.Batch(target))
    compare(head, plan_of(head, runner, tiles, monkeypatch))


@pytest.mark.parametrize("shift", [1e3, -1e3])
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_huge_logits(runner: Runner, tiles: str, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift of all columns, or of those of the first tile alone: the others' share underflows."""
    for columns in (slice(None), slice(0, 4)):
        head = make_head(RAGGED, BY_NAME["sft"], device=runner.device)
        head.bias[columns] += shift
        compare(head, plan_of(head, runner, tiles, monkeypatch))


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_equal_logits(runner: Runner, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The uniform distribution: logp -log V, entropy log V, lse log V + the value."""
    head = make_head(RAGGED, BY_NAME["sft"], device=runner.device)
    head = LinearHead(head.hidden, torch.zeros_like(head.weight), torch.full_like(head.bias, -3.0), head.batch)
    stats = stats_of(head, plan_of(head, runner, tiles, monkeypatch))
    uniform = math.log(37)
    for x, expected in zip(stats, (-uniform, uniform, uniform - 3), strict=True):
        torch.testing.assert_close(x, expected * head.batch.valid.float(), rtol=3e-6, atol=0)


@pytest.mark.parametrize("runner", BACKENDS, ids=str)
def test_one_column(runner: Runner) -> None:
    shape = replace(RAGGED, vocab=1)
    head = make_head(shape, BY_NAME["sft"], device=runner.device)
    ones = torch.ones(3, 4, 4, device=runner.device)
    stats, gradients = with_gradients(head, lambda x: stats_of(x, uk.Plan(runner.backend)), ones)
    assert not stats.logp.any()
    assert not stats.entropy.any()
    logits = (head.used.hidden @ head.weight.t() + head.bias).squeeze(-1)
    torch.testing.assert_close(stats.lse, torch.where(head.batch.valid, logits, 0))
    assert gradients.d_bias.item() == pytest.approx(8.0)  # of lse alone


def masked(head: LinearHead, kept: Tensor) -> LinearHead:
    bias = torch.full_like(head.bias, float("-inf"))
    bias[kept] = head.bias[kept]
    return LinearHead(head.hidden, head.weight, bias, head.batch)


MASKS = {"first_tiles": range(20, 37), "last_tiles": range(9), "all_but_three": (5, 18, 36)}
"""The columns that are left."""

COLUMNS_OF_TILE = {"one": 37, "two": 18, "ten": 4, "one_column": 1, "few_tokens": 12}


def masked_cases() -> list[object]:
    cases = []
    for runner in BACKENDS:
        for tiles in COLUMNS_OF_TILE:
            for mask in MASKS:
                # One case shows it under the interpreter, where a row is slow.
                if not runner.interpreted or (tiles, mask) == ("two", "first_tiles"):
                    cases.append(pytest.param(runner, tiles, mask, id=f"{runner}-{tiles}-{mask}"))
    return cases


@pytest.mark.parametrize(("runner", "tiles", "mask"), masked_cases())
def test_masked_columns(runner: Runner, tiles: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of -inf is as if the columns did not exist, whole tiles of them included."""
    kept = torch.tensor(MASKS[mask], device=runner.device)
    few = torch.randint(0, len(kept), (2, 3)).to(runner.device)
    everything = make_head(RAGGED, BY_NAME["sft"], device=runner.device)
    hidden, weights = torch.randn(2, 3, 12).to(runner.device), torch.randn(3, 2, 3).to(runner.device)
    small = LinearHead(hidden, everything.weight[kept], everything.bias[kept], uk.Batch(few))
    large = masked(LinearHead(hidden, everything.weight, everything.bias, uk.Batch(kept[few])), kept)
    stats, gradients = with_gradients(large, lambda x: stats_of(x, plan_of(large, runner, tiles, monkeypatch)), weights)
    monkeypatch.undo()
    few_stats, few_gradients = with_gradients(small, lambda x: stats_of(x, uk.Plan(runner.backend)), weights)
    for a, b in zip(stats, few_stats, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(gradients.d_hidden, few_gradients.d_hidden, rtol=1e-5, atol=4e-6)
    for name in ("d_weight", "d_bias"):
        whole = getattr(gradients, name)
        torch.testing.assert_close(whole[kept], getattr(few_gradients, name), rtol=1e-5, atol=4e-6)
        whole[kept] = 0
        assert not whole.any(), f"{name} of impossible columns"


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_target_of_probability_zero(runner: Runner, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(RAGGED, BY_NAME["sft"], device=runner.device)
    alone = {"two": (0, 20), "ten": (0, 20), "one": (0, 20, 36), "few_tokens": (0, 20), "one_column": ()}
    for column in alone[tiles]:
        check_impossible(head, column, (column,), plan_of(head, runner, tiles, monkeypatch))


@pytest.mark.parametrize("tiles", ["ten", "one_column", "two"])
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_target_in_a_tile_of_probability_zero(runner: Runner, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(RAGGED, BY_NAME["sft"], device=runner.device)
    check_impossible(head, 36, (36,), plan_of(head, runner, tiles, monkeypatch))
    check_impossible(head, 3, range(20), plan_of(head, runner, tiles, monkeypatch))


def check_impossible(head: LinearHead, target: int, columns: Sequence[int], plan: uk.Plan) -> None:
    """A target of probability zero has logp -inf; its distribution is one all the same."""
    valid = head.batch.valid
    bias = head.bias.clone()
    bias[list(columns)] = float("-inf")
    batch = uk.Batch(torch.where(valid, target, uk.IGNORE))
    stats = stats_of(LinearHead(head.hidden, head.weight, bias, batch), plan)
    assert (stats.logp[valid] == float("-inf")).all()
    for x in stats[1:]:
        assert torch.isfinite(x).all()
        assert x[valid].all()


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_a_row_without_a_distribution_says_so(
    runner: Runner, value: float, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN or +inf in one hidden state, in whatever tile it is met, is NaN in its row and in no other."""
    head = make_head(RAGGED, BY_NAME["sft"], device=runner.device)
    hidden = head.hidden.clone()
    hidden[3, 2] = 0
    hidden[3, 2, 0] = value
    weight = head.weight.abs()
    stats = stats_of(LinearHead(hidden, weight, head.bias, head.batch), plan_of(head, runner, tiles, monkeypatch))
    for x in stats[:2]:
        assert x[3, 2].isnan()
        assert x.isnan().sum() == 1


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_gradcheck(runner: Runner, readout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64: analytic against numeric gradients of logp, entropy and lse."""
    runner.need(torch.float64)
    wide = {"dtype": torch.float64, "device": runner.device}
    operands = [torch.randn(*shape, **wide).requires_grad_() for shape in ((1, 3, 3), (5, 3), (5,))]
    batch = uk.Batch(torch.tensor([[0, uk.IGNORE, 4]], device=runner.device))
    head = LinearHead(*operands, batch)
    plan = plan_of(head, runner, "ten", monkeypatch)

    def statistics(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(stats_of(LinearHead(*leaves, batch), plan, uk.Readout(**READOUTS[readout])))

    assert torch.autograd.gradcheck(statistics, operands)


def test_gradients_of_some_statistics_only(device: str) -> None:
    """Gradients are right if the loss uses only one of the statistics."""
    head = make_head(PACKED, BY_NAME["sft"], device=device)
    for k in range(3):
        weights = torch.zeros(3, 8, device=device)
        weights[k] = torch.randn(8)
        leaves = leaves_of(head)
        stats = stats_of(LinearHead(*leaves, head.batch), chosen_plan(head, 3))
        alone = gradients_of((stats[k] * weights[k]).sum(), leaves)
        _, together = with_gradients(head, lambda x: stats_of(x, uk.Plan()), weights)
        for a, b in zip(alone, together[1:4], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("columns", [25, 4])
def test_chunks_of_a_graph_that_is_recorded(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph cannot wait for the number of tokens that count: ignored ones are multiplied, and are 0 all the
    same, however many tiles they have."""
    head = Head(torch.randn(6, 3), torch.randn(25, 3), None, torch.float32, "eager", 4 * 1024 * columns)
    target = torch.tensor([[3, uk.IGNORE, 24, 0, uk.IGNORE, 9]])
    arguments = head, target, ReadoutArgs(1.0, None, 0.7, None)
    counted = [*flat(observed_in_tiles(*arguments)), *flat(measured_in_tiles(*arguments))]
    for module in (chunks, statistics):
        monkeypatch.setattr(module, "is_recorded", lambda x: True)
    recorded = [*flat(observed_in_tiles(*arguments)), *flat(measured_in_tiles(*arguments))]
    for expected, found in zip(counted, recorded, strict=True):
        torch.testing.assert_close(found, expected)
        assert torch.equal(found[target == uk.IGNORE], expected[target == uk.IGNORE])
