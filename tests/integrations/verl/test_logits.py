"""verl's functions of logits, and this package's: values and gradients, memory, and what verl does around them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.integrations.verl.modules import DTYPES, SHAPES, V, Verl, check, results, verl
from unirl_kernels.integrations import verl as ours

__all__ = ["verl"]

ENTROPIES = {
    "entropy_from_logits": ours.entropy_from_logits,
    "entropy_from_logits_with_chunking": partial(ours.entropy_from_logits_with_chunking, chunk_size=4),
}


SIZE = 3.0
"""Of logits, drawn from a normal distribution."""


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SHAPES[request.param]


def lse_of(logits: Tensor) -> float:
    """What rounding of a log-probability is relative to: the largest |log sum exp|."""
    return torch.logsumexp(logits.double(), -1).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["logprobs_from_logits", "logprobs_from_logits_naive", "logprobs_from_logits_v2"])
def test_logprobs(verl: Verl, name: str, inplace: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, labels = (SIZE * torch.randn(*shape, V)).to(dtype), torch.randint(0, V, shape)
    theirs = getattr(verl.logits, name)
    check(
        lambda x: ours.logprobs_from_logits(logits=x + 0, labels=labels, inplace_backward=inplace),
        lambda x: theirs(x, labels),
        [logits],
        size=lse_of(logits),
    )


def test_logprobs_of_more_dimensions(verl: Verl) -> None:
    logits, labels = SIZE * torch.randn(2, 3, 4, V), torch.randint(0, V, (2, 3, 4))
    theirs = verl.logits.logprobs_from_logits
    check(lambda x: ours.logprobs_from_logits(x, labels), lambda x: theirs(x, labels), [logits], size=lse_of(logits))
    check(ours.entropy_from_logits, verl.logits.entropy_from_logits, [logits], size=lse_of(logits))


def test_labels_of_another_layout() -> None:
    logits, labels = torch.randn(11, V), torch.randint(0, V, (1, 11))
    assert torch.equal(ours.logprobs_from_logits(logits, labels), ours.logprobs_from_logits(logits, labels[0]))


def test_logits_of_any_strides(verl: Verl) -> None:
    columns, labels = SIZE * torch.randn(V, 11), torch.randint(0, V, (11,))
    size = lse_of(columns.t())
    for inplace in (False, True):
        check(
            lambda x, inplace=inplace: ours.logprobs_from_logits((x + 0).t(), labels, inplace),
            lambda x: verl.logits.logprobs_from_logits(x.t(), labels),
            [columns],
            size=size,
        )
    theirs = verl.logits.entropy_from_logits
    check(lambda x: ours.entropy_from_logits(x.t()), lambda x: theirs(x.t()), [columns], size=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy(verl: Verl, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = (SIZE * torch.randn(*shape, V)).to(dtype)
    check(ours.entropy_from_logits, verl.logits.entropy_from_logits, [logits], size=lse_of(logits))


@pytest.mark.parametrize("chunk_size", [4, 2048])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_with_chunking(verl: Verl, dtype: torch.dtype, chunk_size: int) -> None:
    logits = (SIZE * torch.randn(11, V)).to(dtype)
    theirs, exact = verl.logits.entropy_from_logits_with_chunking, verl.logits.entropy_from_logits
    check(
        lambda x: ours.entropy_from_logits_with_chunking(x, chunk_size=chunk_size),
        lambda x: theirs(x, chunk_size=chunk_size),
        [logits],
        exact,
        size=lse_of(logits),
    )


def test_entropy_where_the_first_word_is_masked() -> None:
    """It has to name some target, whose own log-probability may be -inf."""
    logits = torch.randn(4, V)
    expected = results(ours.entropy_from_logits, [logits[:, 1:]])
    logits[:, 0] = float("-inf")
    entropy, gradient = results(ours.entropy_from_logits, [logits])
    torch.testing.assert_close(entropy, expected[0])
    torch.testing.assert_close(gradient[:, 1:], expected[1])
    assert not gradient[:, 0].any()


@pytest.mark.parametrize("name", ENTROPIES)
def test_entropy_compiles(name: str) -> None:
    """As verl does by default (``use_torch_compile``)."""
    compiled = torch.compile(ENTROPIES[name], dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (5, 7):
        logits = torch.randn(length, V)
        for x, wanted in zip(results(compiled, [logits]), results(ENTROPIES[name], [logits]), strict=True):
            assert torch.equal(x, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_entropy_is_recomputed(reentrant: bool) -> None:
    """As verl does with ``entropy_checkpointing``."""
    logits = torch.randn(5, V)
    kept, recomputed = (logits.clone().requires_grad_() for _ in range(2))
    ours.entropy_from_logits(kept).square().sum().backward()
    checkpoint(ours.entropy_from_logits, recomputed, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(recomputed.grad, kept.grad)


def test_gradient_takes_the_memory_of_computed_logits() -> None:
    labels, x = torch.randint(0, V, (11,)), torch.randn(11, V, requires_grad=True)
    for inplace in (True, False):
        memory: dict[str, int] = {}
        logits = 1 * x
        place = logits.data_ptr()
        logits.register_hook(lambda g, memory=memory: memory.setdefault("gradient", g.data_ptr()) and None)
        kept = logits.detach().clone()
        logp = ours.logprobs_from_logits(logits, labels, inplace_backward=inplace)
        assert torch.equal(logits, kept), "the logits can be read until the backward"
        logp.sum().backward()
        assert (memory["gradient"] == place) is inplace
        assert (logits.numel() == 0) is inplace


def test_logits_that_something_else_needs_are_missed() -> None:
    """Never a gradient of logits that are gone: verl itself passes ``inplace_backward=False`` beside an entropy."""
    labels, x = torch.randint(0, V, (11,)), torch.randn(11, V, requires_grad=True)
    logits = 1 * x
    entropy = ours.entropy_from_logits(logits)
    logp = ours.logprobs_from_logits(logits, labels)
    with pytest.raises(RuntimeError, match="logits, target or temperature have changed since the forward"):
        (logp + entropy).sum().backward()


def test_entropy_after_log_probabilities(verl: Verl) -> None:
    """As verl's PrefixGrouper does, with ``inplace_backward`` on: the entropy's backward is the first of the two."""
    logits, labels = SIZE * torch.randn(11, V), torch.randint(0, V, (11,))
    functional = verl.logits

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x / 0.7
        return functional.logprobs_from_logits(x, labels), functional.entropy_from_logits(x)

    def patched(x: Tensor) -> tuple[Tensor, Tensor]:
        with ours.patch():
            return both(x)

    check(patched, both, [logits], size=lse_of(logits / 0.7))


@pytest.mark.parametrize("view", [False, True])
def test_leaf_is_left_alone(view: bool) -> None:
    leaf = torch.randn(1, 11, V, requires_grad=True)
    labels, before = torch.randint(0, V, (1, 11)), leaf.detach().clone()
    logits = leaf.squeeze(0) if view else leaf
    ours.logprobs_from_logits(logits, labels[0] if view else labels).sum().backward()
    assert torch.equal(leaf, before)
    assert leaf.grad is not None


def test_nothing_is_overwritten_without_a_gradient() -> None:
    x, labels = torch.randn(11, V, requires_grad=True), torch.randint(0, V, (11,))
    with torch.no_grad():
        logits = 1 * x
        ours.logprobs_from_logits(logits, labels)
    assert torch.equal(logits, x)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", ["unit", "per_sample"])
def test_packed_step_of_an_engine(verl: Verl, temperature: str, entropy: bool) -> None:
    """What verl's engine for FSDP does to a model's logits (1.0 * x: a model computes them), per sample."""
    functional = verl.logits
    samples = [torch.randint(0, V, (length,)) for length in (4, 1, 6)]
    input_ids = torch.nested.nested_tensor(samples, layout=torch.jagged)
    labels = torch.roll(input_ids.values(), shifts=-1, dims=0)
    divisor = functional.expand_as_nested(torch.tensor([0.5, 1.0, 2.0]), input_ids).values().unsqueeze(-1)
    logits = SIZE * torch.randn(1, 11, V)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        packed = (1.0 * x).squeeze(0)
        if temperature == "per_sample":
            packed = packed / divisor.to(packed.dtype)
        entropies = (functional.entropy_from_logits(packed),) if entropy else ()
        logp = functional.logprobs_from_logits(logits=packed, labels=labels, inplace_backward=not entropy)
        return tuple(
            torch.nested.nested_tensor_from_jagged(found, input_ids.offsets()).values() for found in (logp, *entropies)
        )

    def patched(x: Tensor) -> tuple[Tensor, ...]:
        with ours.patch():
            return step(x)

    check(patched, step, [logits], size=lse_of(logits / 0.5))
