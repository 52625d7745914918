"""TRL's functions of logits and this package's in their place: equal values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

import trl.trainer.utils as utils

from tests.integrations.trl.heads import FUSED, check
from unirl_kernels.integrations.trl import patch, unpatch

V = 101


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    yield
    unpatch()


def logits_of(layout: str) -> Tensor:
    logits = 3 * torch.randn(2, 7, V + 3)
    if layout == "shifted":
        return logits[:, :-1]
    if layout == "padded":
        return logits[..., :V]
    if layout == "transposed":
        return logits.transpose(1, 2).contiguous().transpose(1, 2)
    return logits.view(-1, V + 3) if layout == "flat" else logits


@pytest.mark.parametrize("layout", ["whole", "shifted", "padded", "flat", "transposed"])
@pytest.mark.parametrize("masked", [False, True] if FUSED else [False])
def test_functions_of_logits_give_the_same(layout: str, masked: bool) -> None:
    given = logits_of(layout)
    index = torch.randint(0, V, given.shape[:-1])
    mask = (torch.rand(index.shape) < 0.6).long() if masked else None
    best = given.topk(5, -1).indices

    def call(logits: Tensor) -> list[Tensor]:
        logits = logits.detach().requires_grad_()
        values = [
            utils.selective_log_softmax(logits, index),
            utils.selective_log_softmax(logits, best),
            utils.entropy_from_logits(logits, chunk_size=3),
        ]
        if FUSED:
            values += utils.selective_log_softmax_and_entropy(logits, index, temperature=0.7, row_mask=mask)
            values.append(utils.selective_log_softmax(logits, index, 1.3, mask))
        return [*values, *(torch.autograd.grad(torch.sin(x).sum(), logits, retain_graph=True)[0] for x in values)]

    theirs, truth = call(given), call(given.double())
    with patch():
        ours = call(given)
    check(ours, theirs, truth, len(ours) // 2)


@pytest.mark.skipif(not FUSED, reason="trl before 1.15 has no function of both")
def test_entropy_without_gradient() -> None:
    logits, index = torch.randn(2, 5, V, requires_grad=True), torch.randint(0, V, (2, 5))
    with patch():
        logp, entropy = utils.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)
        expected = utils.entropy_from_logits(logits)
    assert logp.requires_grad
    assert not entropy.requires_grad
    assert torch.equal(entropy, expected)


@pytest.mark.skipif(not FUSED, reason="trl before 1.15 takes no mask")
def test_several_tokens_of_masked_rows() -> None:
    logits, index = torch.randn(2, 5, V), torch.randint(0, V, (2, 5, 3))
    mask = torch.rand(2, 5, 1) < 0.5
    theirs, truth = (utils.selective_log_softmax(x, index, 0.7, mask) for x in (logits, logits.double()))
    with patch():
        ours = utils.selective_log_softmax(logits, index, 0.7, mask)
    check([ours], [theirs], [truth], 1)


@pytest.mark.parametrize("name", ["selective_log_softmax", "entropy_from_logits"])
def test_results_may_be_written_into(name: str) -> None:
    """As trainers before 1.15 do, with zeros where the mask is."""
    logits = torch.randn(2, 5, V, requires_grad=True)
    rest = [torch.randint(0, V, (2, 5))] if name == "selective_log_softmax" else []

    def d_logits() -> Tensor:
        values = getattr(utils, name)(logits, *rest)
        values[:, 3:] = 0.0
        return torch.autograd.grad(torch.sin(values).sum(), logits)[0]

    with patch():
        got = d_logits()
    assert got[:, :3].any()
    assert not got[:, 3:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_short_logits_are_not_rounded(dtype: torch.dtype) -> None:
    logits, index = (4 * torch.randn(3, 6, V)).to(dtype), torch.randint(0, V, (3, 6))

    def call(logits: Tensor) -> list[Tensor]:
        return [utils.selective_log_softmax(logits, index), utils.entropy_from_logits(logits)]

    wide, truth = call(logits.float()), call(logits.double())
    with patch():
        ours = call(logits)
    assert {x.dtype for x in ours} == {torch.float32}
    check(ours, wide, truth, 2)


@pytest.mark.skipif(not FUSED, reason="trl before 1.15 takes no temperature")
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    logits, index = torch.randn(2, 5, V), torch.randint(0, V, (2, 5))
    for guard in (nullcontext, patch):
        with guard(), pytest.raises(ValueError, match="temperature must be positive"):
            utils.selective_log_softmax(logits, index, temperature)
