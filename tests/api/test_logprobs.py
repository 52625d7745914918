"""``logprobs`` and ``linear_logprobs`` are ``token_stats`` for any leading shape, strides and integer labels."""

from __future__ import annotations

import pytest
import torch

import unirl_kernels as uk

V, D = 11, 5
WIDTHS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (2, 2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    hidden, weight = torch.randn(*shape, D), torch.randn(V, D, requires_grad=True)
    labels = torch.randint(V, shape)
    temperature = torch.rand(shape) + 0.5
    readout = uk.Readout(temperature=temperature)
    flat = uk.Readout(temperature=temperature.reshape(-1))
    logits = (hidden @ weight.T).detach().requires_grad_()
    expected = uk.token_stats(logits.reshape(-1, V), labels.reshape(-1), readout=flat).logp.view(shape)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    got = uk.logprobs(logits, labels, readout=readout)
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got.sum(), logits)[0], gradient)

    expected = uk.linear_token_stats(hidden.reshape(-1, D), weight, labels.reshape(-1), readout=flat).logp.view(shape)
    (gradient,) = torch.autograd.grad(expected.sum(), weight)
    got = uk.linear_logprobs(hidden, weight, labels, readout=readout)
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got.sum(), weight)[0], gradient)


def test_other_strides_are_copied() -> None:
    logits = torch.randn(V, 4, 3).requires_grad_()
    turned = logits.permute(2, 1, 0)
    labels = torch.randint(V, (3, 4))
    got = uk.logprobs(turned, labels)
    assert torch.equal(got, uk.logprobs(turned.contiguous(), labels))
    assert torch.autograd.grad(got.sum(), logits)[0].shape == logits.shape
    hidden, weight = torch.randn(D, 4, 3).permute(2, 1, 0), torch.randn(V, D)
    assert torch.equal(uk.linear_logprobs(hidden, weight, labels), uk.linear_logprobs(hidden.clone(), weight, labels))


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_labels_of_any_width(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(2, 2, 3, V), torch.randint(V, (2, 2, 3))
    assert torch.equal(uk.logprobs(logits, labels.to(dtype)), uk.logprobs(logits, labels))
    hidden, weight = torch.randn(2, 2, 3, D), torch.randn(V, D)
    assert torch.equal(uk.linear_logprobs(hidden, weight, labels.to(dtype)), uk.linear_logprobs(hidden, weight, labels))


def test_a_label_that_would_wrap_to_ignore_is_refused() -> None:
    wrapped = torch.tensor([uk.IGNORE, 0]).view(torch.uint64)  # 2^64 - 100
    with pytest.raises(IndexError, match="must lie in"):
        uk.logprobs(torch.randn(2, V), wrapped)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "text"),
    [
        (torch.randn(2, V), torch.zeros(2), TypeError, "labels must be an integer tensor, got float32"),
        (torch.randn(2, V), torch.zeros(2, dtype=torch.bool), TypeError, "labels must be an integer tensor, got bool"),
        (torch.randn(2, V), [0, 1], TypeError, "labels must be an integer tensor, got list"),
        (torch.randn(2, 3, V), torch.zeros(2, dtype=torch.int64), ValueError, r"labels must have shape \(2, 3\)"),
        (torch.tensor(1.0), torch.tensor(0), ValueError, r"must have at least one column, got shape \(\)"),
        ([0.0], torch.tensor(0), TypeError, "must be a tensor, got list"),
    ],
    ids=["float", "bool", "list", "shape", "scalar", "rows"],
)
def test_wrong_arguments_are_named(logits: object, labels: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        uk.logprobs(logits, labels)  # type: ignore[arg-type]
    with pytest.raises(error, match=text):
        uk.linear_logprobs(logits, torch.randn(V, V), labels)  # type: ignore[arg-type]


def test_a_temperature_of_another_shape_is_refused() -> None:
    readout = uk.Readout(temperature=torch.ones(2))
    with pytest.raises(ValueError, match=r"temperature must have shape \(2, 1, 3\), got \(2,\)"):
        uk.logprobs(torch.randn(2, 1, 3, V), torch.zeros(2, 1, 3, dtype=torch.int64), readout=readout)
