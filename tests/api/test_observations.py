"""Level 1: the observations of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME, SHAPES, Shape, make_case
from tests.observed import check
from tests.runners import Runner
from unirl_kernels.backends import COMPOSED, load
from unirl_kernels.backends.groups import ReadoutArgs
from unirl_kernels.testing import oracle

BY_SHAPE = {shape.name: shape for shape in SHAPES}
READOUTS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "negative": {"scale": -1.5},
    "softcap": {"softcap": 5.0},
    "saturated": {"softcap": 0.5},
    "everything": {"temperature": 1.3, "softcap": 5.0, "scale": -0.5},
}
TIES = {
    "neighbours": (4, 5),
    "neighbours of 16 bits": (5, 6),
    "one vector": (1, 3),
    "vectors": (9, 40),
    "lanes": (70, 500),
    "lanes, the other way round": (31, 512),
    "tiles": (2047, 2048),
    "far tiles": (3000, 8100),
    "one lane, tiles of fp64": (41, 2089),
    "one lane, tiles of fp32": (17, 4113),
    "one lane, tiles of 16 bits": (5, 8197),
    "segments": (8191, 8192),
    "segments, the other way round": (130, 8195),
    "the last": (8202, 8202),
}


@pytest.fixture
def runner(runner: Runner) -> Runner:
    if runner.kernel != COMPOSED:
        pytest.skip("observations are the same for every one-pass kernel")
    runner.need_observations()
    return runner


def observe(logits: Tensor, target: Tensor, runner: Runner, **readout: Any) -> uk.TokenObservations:
    given = (logits.to(runner.device), target.to(runner.device))
    return uk.token_observations(*given, readout=uk.Readout(**readout), plan=runner.plan())


def hold(found: uk.TokenObservations, logits: Tensor, target: Tensor, **readout: Any) -> None:
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in readout.items()}
    z = (oracle.apply_readout(logits.double(), **exact), oracle.apply_readout(logits.float(), **readout))
    check(found, logits, target, *z, readout.get("scale", 1.0))


def compare(shape: Shape, runner: Runner, **readout: Any) -> None:
    logits, batch = make_case(shape, BY_NAME["sft"], runner.device)
    hold(observe(logits, batch.target, runner, **readout), logits, batch.target, **readout)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_observations(shape: Shape, runner: Runner) -> None:
    if not runner.takes(shape):
        pytest.skip(f"{shape.n_logits} logits are too many for Triton's interpreter")
    compare(shape, runner)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("shape", ["small", "bf16", "row_padding", "masked"])
def test_readouts(readout: str, shape: str, runner: Runner) -> None:
    if shape == "masked" and "scale" in READOUTS[readout]:
        pytest.skip("-inf is then the largest z")
    compare(BY_SHAPE[shape], runner, **READOUTS[readout])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", ["small", "packed"])
def test_temperature_per_token(shape: str, softcap: float | None, runner: Runner) -> None:
    _, batch = make_case(BY_SHAPE[shape], BY_NAME["sft"], runner.device)
    temperature = (0.5 + torch.rand(batch.target.shape)).to(runner.device)
    compare(BY_SHAPE[shape], runner, softcap=softcap, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_the_first_maximum_wins(scale: float, dtype: torch.dtype, runner: Runner) -> None:
    if runner.interpreted and (dtype == torch.bfloat16) != (scale == 1.0):
        pytest.skip("a row is slow under the interpreter")
    vocab = 8203
    logits = -scale * torch.rand(1, len(TIES), vocab).to(dtype)
    for row, columns in zip(logits[0], TIES.values(), strict=True):
        row[list(columns)] = 3 * scale
    found = observe(logits, torch.zeros(1, len(TIES), dtype=torch.int64), runner, scale=scale)
    got = dict(zip(TIES, found.argmax[0].tolist(), strict=True))
    assert got == {name: columns[0] for name, columns in TIES.items()}


@pytest.mark.parametrize("vocab", [1, 101, 8203])
def test_equal_logits(vocab: int, runner: Runner) -> None:
    found = observe(torch.full((2, vocab), -7.25), torch.zeros(2, dtype=torch.int64), runner, temperature=2.0)
    assert found.argmax.tolist() == [0, 0]
    assert found.mean_logit.tolist() == pytest.approx([-3.625] * 2, rel=1e-6)
    expected = -torch.log(torch.full((2,), float(vocab))).to(runner.device)
    torch.testing.assert_close(found.log_sum_sq_probs, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_a_softcap_hides_no_maximum(scale: float, runner: Runner) -> None:
    """tanh rounds to 1 for both logits, but the argmax is the larger raw logit."""
    logits = torch.randn(1, 300)
    logits[0, [20, 200]] = scale * torch.tensor([90.0, 90.5])
    found = observe(logits, torch.tensor([7]), runner, softcap=2.0, scale=scale)
    assert found.argmax.item() == 200


def test_masked_words(runner: Runner) -> None:
    """-inf logits make the mean -inf, unless a softcap bounds them. They are the argmax only if all logits are -inf."""
    logits = torch.full((4, 2100), -torch.inf)
    logits[0, 2077], logits[1, ::2], logits[2, :5] = -3.0, 0.5, torch.arange(5.0)
    target = torch.tensor([2077, 0, 4, 9])
    found = observe(logits, target, runner)
    assert found.argmax.tolist() == [2077, 0, 4, 0]
    assert found.mean_logit.isneginf().all()
    truth = torch.tensor([0.0, -1050.0]), torch.arange(5.0).log_softmax(0).mul(2).logsumexp(0)
    expected = torch.stack([truth[0][0], -torch.log(-truth[0][1]), truth[1]]).to(runner.device)
    torch.testing.assert_close(found.log_sum_sq_probs[:3], expected, rtol=1e-6, atol=1e-6)
    capped = observe(logits, target, runner, softcap=5.0)
    assert capped.argmax.tolist() == [2077, 0, 4, 0]
    torch.testing.assert_close(capped.mean_logit, torch.tanh(logits.to(runner.device) / 5).mul(5).mean(-1))


def test_rows_without_a_distribution_have_no_argmax(runner: Runner) -> None:
    logits = torch.randn(4, 600)
    logits[1, 17], logits[2, 599] = torch.nan, torch.inf
    target = torch.tensor([1, 2, 3, 4])
    found, clean = observe(logits, target, runner), observe(logits[[0, 3]], target[[0, 3]], runner)
    assert found.argmax[1:3].tolist() == [-1, -1]
    assert found.log_sum_sq_probs[1:3].isnan().all()
    assert not found.mean_logit[1:3].isfinite().any()
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[[0, 3]], y)


def test_ignored_rows_are_not_read(runner: Runner) -> None:
    logits = torch.randn(4, 65)
    logits[1:3] = torch.nan
    target = torch.tensor([3, uk.IGNORE, uk.IGNORE, 4])
    found = observe(logits, target, runner)
    assert found.argmax[1:3].tolist() == [-1, -1]
    for x in found[:-1]:
        assert not x[1:3].any()
        assert x[[0, 3]].isfinite().all()


def test_targets_that_are_no_words(runner: Runner) -> None:
    logits, target = torch.randn(1, 3, 65), torch.tensor([[3, 65, -1]])
    if runner.device == "cpu":
        with pytest.raises(IndexError, match=r"target must lie in \[0, 65\) or be -100, got 65 at \(1,\)"):
            observe(logits, target, runner)
    readout = ReadoutArgs(1.0, None, 1.0, None)
    rows = load(runner.backend).token_observations(logits.to(runner.device), target.to(runner.device), readout)
    assert rows.observations.argmax[0, 1:].tolist() == [-1, -1]
    for x in (*rows.stats, *rows.moments, *rows.observations[:-1]):
        assert x[0, 1:].isnan().all()
        assert x[0, 0].isfinite()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("shape", ["small", "bf16"])
def test_statistics_and_gradients_are_those_of_token_stats(shape: str, overwrite: bool, runner: Runner) -> None:
    logits, batch = make_case(BY_SHAPE[shape], BY_NAME["sft"], runner.device)
    if runner.interpreted and (shape == "bf16") != overwrite:
        pytest.skip("two of the four cases show it; a row is slow under the interpreter")
    weights = torch.randn(3, *batch.target.shape, device=runner.device)
    results = []
    for measure in (uk.token_stats, uk.token_observations):
        leaf = logits.detach().requires_grad_()
        computed = leaf * 1
        address = computed.data_ptr()
        seen: list[int] = []
        computed.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        found = measure(computed, batch.target, plan=runner.plan(overwrite_logits=overwrite))
        stats = (found.logp, found.entropy, found.lse)
        assert [x.requires_grad for x in found] == [True] * 3 + [False] * (len(found) - 3)
        sum((x * w).sum() for x, w in zip(stats, weights, strict=True)).backward()
        assert (seen == [address]) == overwrite
        results.append([*(x.detach() for x in stats), leaf.grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_the_row_alone(dtype: torch.dtype, runner: Runner) -> None:
    if runner.backend == "eager":
        pytest.skip("torch chooses how to add by the shape of the whole tensor")
    if runner.interpreted and dtype == torch.float32:
        pytest.skip("a row is slow under the interpreter")
    logits = (torch.randn(4, 5003) * 3).to(dtype).to(runner.device)
    target = torch.randint(0, 5003, (4,), device=runner.device)
    shifted = torch.empty(4 * 5003 + 1, dtype=dtype, device=runner.device)[1:].view(4, 5003).copy_(logits)
    whole = observe(logits, target, runner)
    for rows, x in ((slice(0, 4), logits), (slice(2, 3), logits), (slice(1, 3), logits), (slice(0, 4), shifted)):
        for a, b in zip(whole, observe(x[rows], target[rows], runner), strict=True):
            assert torch.equal(a[rows], b)


MUTANTS: dict[str, Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]] = {
    "the last maximum wins": lambda x, z, p: {"argmax": x.shape[-1] - 1 - x.flip(-1).argmax(-1)},
    "mean of raw logits": lambda x, z, p: {"mean_logit": x.mean(-1)},
    "temperature left out": lambda x, z, p: {"mean_logit": 1.3 * z.mean(-1)},
    "one column too many": lambda x, z, p: {"mean_logit": z.sum(-1) / (z.shape[-1] + 1)},
    "sum of p": lambda x, z, p: {"log_sum_sq_probs": p.sum(-1).log().clamp(max=0)},
    "sum of cubes": lambda x, z, p: {"log_sum_sq_probs": p.pow(3).sum(-1).log()},
    "lse once": lambda x, z, p: {"log_sum_sq_probs": (p * p).sum(-1).log() + torch.logsumexp(z, -1)},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_observation_fails(mutant: str) -> None:
    """The comparison can fail: it finds wrong observations."""
    readout = {"temperature": 1.3, "softcap": 5.0}
    logits, target = torch.randn(4, 515).mul(2).round(), torch.randint(0, 515, (4,))
    found = uk.token_observations(logits, target, readout=uk.Readout(**readout))
    hold(found, logits, target, **readout)
    z = oracle.apply_readout(logits, **readout)
    with pytest.raises(AssertionError):
        hold(found._replace(**MUTANTS[mutant](logits, z, z.softmax(-1))), logits, target, **readout)
