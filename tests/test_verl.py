"""verl's functions: ours beside plain PyTorch, in the places of a package made like verl, and of verl where it is."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from unirl_kernels.accuracy import violations
from unirl_kernels.integrations import verl as ours

V, D = 61, 16
SHAPES = {"removed_padding": (11,), "one_row": (1, 11), "padded": (3, 5), "more": (2, 3, 4)}


def plain_logprobs(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    return log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def plain_entropy(logits: Tensor) -> Tensor:
    logp = log_softmax(logits, -1)
    return -(logp.exp() * logp).sum(-1)


def plain_linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(labels.shape).reshape(-1, 1)
    logits = linear(hidden.reshape(-1, D), weight) / temperature
    logp = plain_logprobs(logits, labels.reshape(-1))
    return {"none": logp, "sum": logp.sum(), "mean": logp.mean()}[reduction], plain_entropy(logits)


def results(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """What a function returns, and the gradients of it all with some upstream gradient."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    returned = function(*leaves)
    values = list(returned) if isinstance(returned, tuple) else [returned]
    upstream = [torch.cos(torch.arange(x.numel())).view(x.shape).to(x) for x in values]
    return [x.detach() for x in (*values, *torch.autograd.grad(values, leaves, upstream))]


def check(function: Callable[..., Any], plain: Callable[..., Any], *tensors: Tensor, ulps: float = 8.0) -> None:
    """Values and gradients are within the budget that plain PyTorch sets in float32."""
    got = results(function, list(tensors))
    known = results(plain, [x.float() for x in tensors])
    truth = results(plain, [x.double() for x in tensors])
    for x, theirs, wanted in zip(got, known, truth, strict=True):
        theirs = theirs.to(x.dtype)
        assert not violations(x, theirs, wanted, ulps=ulps)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SHAPES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels = (3 * torch.randn(*shape, V)).to(dtype), torch.randint(0, V, shape)
    for inplace in (False, True):
        check(
            lambda x, inplace=inplace: ours.logprobs_from_logits(x + 0, labels, inplace_backward=inplace),
            lambda x: plain_logprobs(x, labels),
            logits,
        )
    logp = ours.logprobs_from_logits(logits=logits, labels=labels)
    assert logp.dtype == torch.float32
    assert logp.shape == shape


def test_labels_of_another_layout() -> None:
    logits, labels = torch.randn(11, V), torch.randint(0, V, (1, 11))
    assert torch.equal(ours.logprobs_from_logits(logits, labels), ours.logprobs_from_logits(logits, labels[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_entropy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(*shape, V)).to(dtype)
    check(ours.entropy_from_logits, plain_entropy, logits)
    assert ours.entropy_from_logits(logits).dtype == torch.float32


def test_entropy_where_the_first_word_is_masked() -> None:
    """It has to name some target, whose own log-probability may be -inf."""
    logits = torch.randn(4, V)
    expected = results(ours.entropy_from_logits, [logits[:, 1:]])
    logits[:, 0] = float("-inf")
    entropy, gradient = results(ours.entropy_from_logits, [logits])
    torch.testing.assert_close(entropy, expected[0])
    torch.testing.assert_close(gradient[:, 1:], expected[1])
    assert not gradient[:, 0].any()


def test_entropy_compiles() -> None:
    """As verl does by default (``use_torch_compile``)."""
    logits = torch.randn(5, V)
    compiled = torch.compile(ours.entropy_from_logits, dynamic=True, fullgraph=True, backend="aot_eager")
    for x, wanted in zip(results(compiled, [logits]), results(ours.entropy_from_logits, [logits]), strict=True):
        torch.testing.assert_close(x, wanted)


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
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (logp + entropy).sum().backward()


@pytest.mark.parametrize("view", [False, True])
def test_leaf_is_left_alone(view: bool) -> None:
    leaf = torch.randn(1, 11, V, requires_grad=True)
    labels, before = torch.randint(0, V, (1, 11)), leaf.detach().clone()
    logits = leaf.squeeze(0) if view else leaf
    ours.logprobs_from_logits(logits, labels[0] if view else labels).sum().backward()
    assert torch.equal(leaf, before)
    assert leaf.grad is not None
    with torch.no_grad():
        ours.logprobs_from_logits(1 * leaf, labels)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("temperature", ["unit", "number", "tensor", "per_token"])
def test_linear_cross_entropy(shape: tuple[int, ...], temperature: str, reduction: str) -> None:
    hidden, weight, labels = torch.randn(*shape, D), torch.randn(V, D), torch.randint(0, V, shape)
    divisor = {
        "unit": 1.0,
        "number": 0.7,
        "tensor": torch.tensor(1.3),
        "per_token": 0.5 + torch.rand(shape),
    }[temperature]

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, w: function(x, w, labels, divisor, reduction)

    # Gradients are sums of terms that cancel: rounding is of the size of the terms.
    check(of(ours.linear_cross_entropy), of(plain_linear), hidden, weight, ulps=64.0)
    logp, entropy = ours.linear_cross_entropy(hidden, weight, labels, divisor, reduction.upper(), None)
    assert logp.shape == (() if reduction != "none" else (labels.numel(),))
    assert entropy.shape == (labels.numel(),)


def test_linear_cross_entropy_of_bfloat16() -> None:
    hidden, weight = torch.randn(11, D).bfloat16(), torch.randn(V, D).bfloat16()
    labels = torch.randint(0, V, (11,))
    logp, entropy = ours.linear_cross_entropy(hidden, weight, labels)
    assert logp.dtype == entropy.dtype == torch.float32
    wanted = plain_linear(hidden.double(), weight.double(), labels)
    torch.testing.assert_close((logp.double(), entropy.double()), wanted, rtol=1e-5, atol=1e-5)


def test_linear_cross_entropy_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = torch.randn(5, D), torch.randn(V, D), torch.randint(0, V, (5,))
    with pytest.raises(ValueError, match="reduction must be one of none, sum, mean, got 'median'"):
        ours.linear_cross_entropy(*arguments, reduction="median")
    group, size = object(), 2
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda given: size if given is group else 0)
    with pytest.raises(ValueError, match=r"dist_process_group must be of one process .*, got 2"):
        ours.linear_cross_entropy(*arguments, 1.0, "none", group)
    size = 1
    got = ours.linear_cross_entropy(*arguments, 1.0, "none", group)
    assert torch.equal(got[0], ours.linear_cross_entropy(*arguments)[0])


class LinearCrossEntropy(torch.autograd.Function):
    """verl's, in name and signature."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float | None = 1.0,
        reduction: str | None = "none",
        dist_process_group: Any = None,
    ) -> list[Tensor]:
        raise NotImplementedError


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """A package laid out like verl 0.9: two modules that define the functions, and two that import them by name."""
    names = (
        "verl",
        "verl.utils",
        "verl.utils.torch_functional",
        "verl.utils.kernel",
        "verl.utils.kernel.linear_cross_entropy",
        "verl.workers",
        "verl.workers.late",
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__path__ = []  # type: ignore[attr-defined]
        if name != "verl.workers.late":
            monkeypatch.setitem(sys.modules, name, module)
    functional, kernel = modules["verl.utils.torch_functional"], modules["verl.utils.kernel.linear_cross_entropy"]
    functional.logprobs_from_logits = plain_logprobs  # type: ignore[attr-defined]
    functional.entropy_from_logits = plain_entropy  # type: ignore[attr-defined]
    kernel.LinearCrossEntropy = LinearCrossEntropy  # type: ignore[attr-defined]
    kernel.linear_cross_entropy = LinearCrossEntropy.apply  # type: ignore[attr-defined]
    modules["verl.workers"].logprobs = plain_logprobs  # type: ignore[attr-defined]
    monkeypatch.setattr(ours, "version", lambda _: "0.9.1")
    yield modules
    ours.unpatch()


def is_patched(functional: ModuleType, kernel: ModuleType) -> list[bool]:
    return [
        getattr(module, name, None) is getattr(ours, name)
        for module, name in (
            (functional, "logprobs_from_logits"),
            (functional, "entropy_from_logits"),
            (kernel, "linear_cross_entropy"),
        )
    ]


def test_patch_and_unpatch(fake: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    places = fake["verl.utils.torch_functional"], fake["verl.utils.kernel.linear_cross_entropy"]
    own = places[1].linear_cross_entropy
    stranger = ModuleType("verlorn")
    stranger.logprobs = plain_logprobs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "verlorn", stranger)
    ours.unpatch()
    ours.patch()
    ours.patch()
    assert all(is_patched(*places))
    assert fake["verl.workers"].logprobs is ours.logprobs_from_logits
    assert stranger.logprobs is plain_logprobs
    late = fake["verl.workers.late"]  # imported under the patch
    late.linear_cross_entropy = places[1].linear_cross_entropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, late.__name__, late)
    ours.unpatch()
    ours.unpatch()
    assert not any(is_patched(*places))
    assert places[0].entropy_from_logits is plain_entropy
    assert fake["verl.workers"].logprobs is plain_logprobs
    assert late.linear_cross_entropy is own
    with ours.patch():
        assert all(is_patched(*places))
    assert not any(is_patched(*places))


def test_patch_refuses_what_it_does_not_know(fake: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    places = fake["verl.utils.torch_functional"], fake["verl.utils.kernel.linear_cross_entropy"]

    def refused(module: ModuleType, name: str, value: object, match: str) -> None:
        with monkeypatch.context() as changed:
            if value is None:
                changed.delattr(module, name)
            else:
                changed.setattr(module, name, value)
            with pytest.raises(RuntimeError, match=match):
                ours.patch()
            assert not any(is_patched(*places))

    refused(ours, "version", lambda _: "0.8.0", r"verl must be of version 0\.9, got 0\.8\.0")
    refused(ours, "version", lambda _: "1.0rc1", r"verl must be of version 0\.9, got 1\.0rc1")
    refused(
        places[0],
        "logprobs_from_logits",
        lambda logits, labels: None,
        r"looked for logprobs_from_logits\(logits, labels, inplace_backward\) in verl\.utils\.torch_functional, "
        r"found logprobs_from_logits\(logits, labels\)",
    )
    refused(places[0], "entropy_from_logits", None, r"looked for entropy_from_logits\(logits\) .*, found nothing of")
    refused(places[1], "LinearCrossEntropy", None, r"looked for LinearCrossEntropy\(hidden, weight, labels, temp")
    refused(places[1], "linear_cross_entropy", None, r"looked for linear_cross_entropy = LinearCrossEntropy\.apply")

    def absent(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(ours, "version", absent)
    with pytest.raises(ImportError, match="verl is not installed: pip install verl"):
        ours.patch()


@pytest.fixture
def real() -> Iterator[tuple[ModuleType, ModuleType]]:
    """verl's own modules."""
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    names = "verl.utils.torch_functional", "verl.utils.kernel.linear_cross_entropy"
    try:
        functional, kernel = map(importlib.import_module, names)
    except ImportError as error:
        pytest.skip(f"verl cannot be imported here: {error}")
    yield functional, kernel
    ours.unpatch()


def test_definitions_of_verl(real: tuple[ModuleType, ModuleType]) -> None:
    """What verl computes is what its kernels are to compute: values and gradients, in the layouts that it uses."""
    functional, _ = real
    for shape in ((11,), (1, 11), (3, 5)):
        logits, labels = 3 * torch.randn(*shape, V), torch.randint(0, V, shape)
        for theirs in (functional.logprobs_from_logits_naive, functional.logprobs_from_logits_v2):
            got = results(lambda x, labels=labels: ours.logprobs_from_logits(x, labels), [logits])
            wanted = results(lambda x, labels=labels, theirs=theirs: theirs(x, labels), [logits])
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        got, wanted = results(ours.entropy_from_logits, [logits]), results(functional.entropy_from_logits, [logits])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_patch_of_verl(real: tuple[ModuleType, ModuleType]) -> None:
    functional, kernel = real
    before = functional.logprobs_from_logits, functional.entropy_from_logits, kernel.linear_cross_entropy
    logits, labels = torch.randn(2, 9, V), torch.randint(0, V, (2, 9))
    wanted = functional.log_probs_from_logits_response(labels, logits, 4)
    with ours.patch():
        assert all(is_patched(*real))
        got = functional.log_probs_from_logits_response(labels, logits, 4)
        hidden, weight = torch.randn(2, 9, D), torch.randn(V, D)
        logp, entropy = kernel.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
        torch.testing.assert_close((logp, entropy), plain_linear(hidden, weight, labels, 0.7), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, wanted)
    after = functional.logprobs_from_logits, functional.entropy_from_logits, kernel.linear_cross_entropy
    assert all(x is y for x, y in zip(before, after, strict=True))
