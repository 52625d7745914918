"""The same bits in every process and thread, after a fork, and after public values were copied or saved."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import unirl_kernels as uk
from tests import ROOT
from unirl_kernels.backends import load

V, D = 301, 24


def bits(seed: int = 0) -> list[Tensor]:
    """Losses, statistics and gradients on logits and on a head."""
    random = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(4, 8, D, generator=random), torch.randn(V, D, generator=random)
    target = torch.randint(0, V, (4, 8), generator=random)
    batch = uk.Batch(target, torch.randn(4, generator=random), None, -torch.rand(4, 8, generator=random))
    found: list[Tensor] = []
    for loss in (uk.grpo(), uk.dpo()):
        logits = (hidden @ weight.T).requires_grad_()
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = uk.fused_loss(logits, batch, loss)
        head = uk.fused_linear_loss(*leaves, batch, loss)
        found += [out.loss, out.logp, *torch.autograd.grad(out.loss, logits)]
        found += [head.loss, head.entropy, *torch.autograd.grad(head.loss, leaves)]
    return [x.detach() for x in found]


def test_two_processes_give_the_same_bits() -> None:
    code = "import pickle, sys; from tests.api.test_promises import bits; sys.stdout.buffer.write(pickle.dumps(bits()))"
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, timeout=100).stdout
        for _ in range(2)
    ]
    first, second = map(pickle.loads, runs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_threads_that_call_at_once() -> None:
    seeds = [0, 1, 2, 3] * 4
    expected = {seed: bits(seed) for seed in set(seeds)}
    with ThreadPoolExecutor(4) as pool:
        for seed, got in zip(seeds, pool.map(bits, seeds), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(got, expected[seed], strict=True))


class Losses(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(1)
        return bits(index)[0]


def test_forked_data_loaders() -> None:
    expected = [bits(seed)[0] for seed in range(4)]  # the parent has used the kernels and their threads before
    loader = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(x, y) for x, y in zip(loader, expected, strict=True))


def test_deterministic_algorithms() -> None:
    expected = bits()
    torch.use_deterministic_algorithms(True)
    try:
        got = bits()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("make", [uk.grpo, uk.dpo])
def test_a_head_that_fails_in_its_second_chunk(make: Any, error: BaseException, monkeypatch: Any) -> None:
    """Inputs are whole, and the next call works."""
    hidden, weight = torch.randn(4, 8, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    batch = uk.Batch(torch.randint(0, V, (4, 8)), torch.randn(4), None, -torch.rand(4, 8))
    plan, before = uk.Plan("cpu", max_chunk_bytes=4 * V * 16), (hidden.detach().clone(), weight.detach().clone())

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            uk.fused_linear_loss(hidden, weight, batch, make(), plan=plan).loss, (hidden, weight)
        )

    expected, kernels = run(), load("cpu")
    name = "fused_loss" if make is uk.grpo else "token_stats_backward"
    own, calls = getattr(kernels, name), []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return own(*args)

    with monkeypatch.context() as patched:
        patched.setattr(kernels, name, failing)
        with pytest.raises(type(error)):
            run()
    assert len(calls) == 2
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])
    assert all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))


def values() -> dict[str, Any]:
    target, logits = torch.randint(0, V, (2, 3)), torch.randn(2, 3, V)
    batch = uk.Batch(target, torch.ones(2), torch.zeros(2, 3), torch.zeros(2, 3), fields={"a": torch.ones(2)})
    out = uk.fused_loss(logits, batch, uk.grpo())
    return {
        "recipe": uk.grpo(),
        "pairs": uk.dpo(),
        "sum": uk.ppo() + 0.1 * uk.Loss(uk.sft().objective, uk.TokenMean()),
        "batch": batch,
        "plan": uk.Plan("cpu", max_chunk_bytes=100),
        "readout": uk.Readout(torch.ones(2, 3), 30.0),
        "statistics": uk.token_stats(logits, target),
        "observations": uk.token_observations(logits, target),
        "output": out,
        "parts": out.metric_parts,
    }


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", values())
def test_copies_and_files(name: str, how: Any) -> None:
    value = values()[name]
    other = how(value)
    assert type(other) is type(value)
    assert repr(other) == repr(value)
    if isinstance(value, uk.Loss):
        assert other == value
    if name == "output":
        assert all(torch.equal(other.metrics[key], x) for key, x in value.metrics.items())
