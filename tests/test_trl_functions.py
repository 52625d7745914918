"""TRL's functions and this package's in their place: equal outputs and gradients, and every object put back."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

import trl.trainer.utils as utils

import unirl_kernels as uk
from unirl_kernels.integrations.trl import OUTPUTS, FusedHead, LogitFunctions, patch, unpatch

N, V, D = 13, 101, 24
NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy", "_ChunkedLogProbFunction")
READOUTS: dict[str, tuple[float, float | None, float]] = {
    "plain": (1.0, None, 1.0),
    "temperature": (0.7, None, 1.0),
    "softcap": (1.0, 5.0, 1.0),
    "scale": (1.0, None, 0.25),
    "all": (1.3, 3.0, 2.0),
}
HEAD = utils._ChunkedLogProbFunction


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    yield
    unpatch()


def inputs(bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    hidden, weight = torch.randn(N, D), 0.5 * torch.randn(V, D)
    targets = torch.randint(0, V, (N,))
    with torch.no_grad():
        targets[::3] = (hidden @ weight.t()).argmax(-1)[::3]  # some are right
    return hidden, weight, torch.randn(V) if bias else None, targets


def scored(apply: Callable[..., Any], given: Sequence[Any], readout: tuple[float, float | None, float]) -> list[Tensor]:
    """What a head gives, and the gradients of a loss of its log-probabilities and entropies."""
    *leaves, targets = given
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    temperature, softcap, scale = readout
    # Two tiles of the vocabulary for TRL's own.
    outputs = apply(*leaves, targets, temperature, 64, softcap, scale, ("log_probs", *OUTPUTS))
    torch.manual_seed(7)
    loss = sum((x.float() * torch.randn(N)).sum() for x in outputs[:2])
    return [*outputs, *torch.autograd.grad(loss, [x for x in leaves if x is not None])]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_head_gives_the_same(readout: str, bias: bool) -> None:
    given = inputs(bias)
    expected = scored(HEAD.apply, given, READOUTS[readout])
    assert 0 < expected[4].sum() < N
    with patch():
        assert utils._ChunkedLogProbFunction is not HEAD
        got = scored(utils._ChunkedLogProbFunction.apply, given, READOUTS[readout])
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_head_is_nearer_to_the_truth_than_its_own_under_autocast() -> None:
    """TRL rounds logits to bf16; both multiply operands of bf16. So the truth is fp64 of rounded operands."""
    given = inputs(True)
    rounded = [x.bfloat16().double() if x.is_floating_point() else x for x in given if x is not None]
    readout = READOUTS["temperature"]
    truth = scored(FusedHead(uk.Plan()).score, rounded, readout)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = scored(HEAD.apply, given, readout)
        with patch():
            ours = scored(utils._ChunkedLogProbFunction.apply, given, readout)
    for i, (a, b, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert a.dtype == b.dtype
        if a.dtype is torch.bool:
            assert torch.equal(a, true)
            continue
        error, budget = (a - true).abs().max(), (b - true).abs().max()
        # Gradients: their products' operands are rounded to bf16 by both.
        assert error <= (1.0 if i < 5 else 1.5) * budget + 1e-5, i


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), ("log_probs", "mean_logits", "is_top1")])
def test_head_gives_what_is_asked_for(outputs: tuple[str, ...]) -> None:
    hidden, weight, _, targets = inputs(False)
    args = (hidden, weight, None, targets, 1.0, 64, None, 1.0, outputs)
    expected = HEAD.apply(*args)
    for a, b in zip(FusedHead(uk.Plan()).score(*args), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_unknown_output_is_refused() -> None:
    hidden, weight, _, targets = inputs(False)
    with pytest.raises(ValueError, match=r"outputs must be among entropy, .*, got median"):
        FusedHead(uk.Plan()).score(hidden, weight, None, targets, 1.0, 64, outputs=("log_probs", "median"))


def test_heads_of_older_versions() -> None:
    hidden, weight, bias, targets = inputs(True)
    head = FusedHead(uk.Plan())
    expected = HEAD.apply(hidden, weight, bias, targets, 0.7, 64, 5.0, 2.0, ("log_probs", "entropy"))[:2]
    torch.testing.assert_close(head.with_entropy(hidden, weight, bias, targets, 0.7, 64, 5.0, 2.0), expected)
    expected = HEAD.apply(hidden, weight, None, targets, 0.7, 64, None, 1.0, ("log_probs", "entropy"))[:2]
    torch.testing.assert_close(head.without_bias(hidden, weight, targets, 0.7, 64), expected)
    torch.testing.assert_close(head.without_bias(hidden, weight, targets, 0.7, 64, None, 1.0), expected)


def test_weight_of_another_dtype_takes_that_of_hidden() -> None:
    """As TRL's head does without autocast; the gradient comes back in the weight's own."""
    hidden, weight, _, targets = inputs(False)
    weight = weight.bfloat16().requires_grad_()
    theirs, ours = (
        apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, ("log_probs",))[0]
        for apply in (HEAD.apply, FusedHead(uk.Plan()).score)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (a,), (b,) = (torch.autograd.grad(x.sum(), weight) for x in (ours, theirs))
    assert a.dtype is torch.bfloat16
    torch.testing.assert_close(a, b)


def test_partitioned_weight_is_refused() -> None:
    hidden, weight, _, targets = inputs(False)
    weight = torch.nn.Parameter(weight)
    weight.ds_id = 0  # type: ignore[attr-defined]
    with patch(), pytest.raises(ValueError, match="weight must not be partitioned by ZeRO-3"):
        utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64)


class _Backbone(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rows = torch.nn.Embedding(V, D), 0

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.embedding(input_ids))


class _Model(torch.nn.Module):
    """What ``add_fused_lm_head`` asks of a model."""

    def __init__(self) -> None:
        from transformers import LlamaConfig

        super().__init__()
        self.base_model, self.head, self.config = _Backbone(), torch.nn.Linear(D, V), LlamaConfig()

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor) -> Any:
        raise AssertionError("the fused head takes its place")


@pytest.mark.parametrize("ignored", ["some", "all"])
def test_ignored_places_are_not_scored(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what counts reaches the head; where nothing does, the loss is a zero that can be differentiated."""
    rows = []
    score = FusedHead.score
    monkeypatch.setattr(FusedHead, "score", lambda *args: rows.append(len(args[1])) or score(*args))
    model = _Model()
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *OUTPUTS))  # type: ignore[arg-type]
    ids = torch.randint(0, V, (3, 9))
    labels = ids.clone()
    labels[:, : 5 if ignored == "some" else 9] = -100

    def step() -> tuple[list[Any], list[Tensor]]:
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss + 0.1 * out.entropy.sum()).backward()
        return list(out.values()), [p.grad.clone() for p in model.parameters()]

    expected = step()
    with patch():
        got = step()
    assert rows == [12 if ignored == "some" else 0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert all(bool(grad.any()) == (ignored == "some") for grad in got[1])


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
@pytest.mark.parametrize("masked", [False, True])
def test_functions_of_logits_give_the_same(layout: str, masked: bool) -> None:
    logits = logits_of(layout).detach().requires_grad_()
    index = torch.randint(0, V, logits.shape[:-1])
    mask = (torch.rand(index.shape) < 0.6).long() if masked else None

    def call() -> list[Tensor]:
        logp, entropy = utils.selective_log_softmax_and_entropy(logits, index, temperature=0.7, row_mask=mask)
        _, frozen = utils.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)
        assert not frozen.requires_grad
        alone = utils.selective_log_softmax(logits, index, 1.3, mask)
        several = utils.selective_log_softmax(logits, logits.topk(5, -1).indices)
        plain = utils.entropy_from_logits(logits, chunk_size=3)
        values = [logp, entropy, alone, several, plain]
        grads = [torch.autograd.grad(torch.sin(x).sum(), logits, retain_graph=True)[0] for x in values]
        return [*values, frozen, *grads]

    expected = call()
    with patch():
        got = call()
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_several_words_of_masked_rows() -> None:
    logits, index = torch.randn(2, 5, V), torch.randint(0, V, (2, 5, 3))
    mask = torch.rand(2, 5, 1) < 0.5
    expected = utils.selective_log_softmax(logits, index, 0.7, mask)
    got = LogitFunctions(uk.Plan()).selective_log_softmax(logits, index, 0.7, mask)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_short_logits_are_not_rounded(dtype: torch.dtype) -> None:
    logits, index = (4 * torch.randn(3, 6, V)).to(dtype), torch.randint(0, V, (3, 6))
    expected = [
        f(logits.float(), *rest)
        for f, rest in ((utils.selective_log_softmax, [index]), (utils.entropy_from_logits, []))
    ]
    with patch():
        got = [utils.selective_log_softmax(logits, index), utils.entropy_from_logits(logits)]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    logits, index = torch.randn(2, 5, V), torch.randint(0, V, (2, 5))
    for guard in (nullcontext, patch):
        with guard(), pytest.raises(ValueError, match="temperature must be positive"):
            utils.selective_log_softmax(logits, index, temperature)


def loaded() -> dict[tuple[str, str], object]:
    """Every object of every trl module."""
    modules = [(name, module) for name, module in sys.modules.items() if name.split(".")[0] == "trl"]
    return {(name, key): value for name, module in modules for key, value in vars(module).items()}


def check_same(before: dict[tuple[str, str], object]) -> None:
    now = loaded()
    assert [place for place, value in before.items() if now.get(place) is not value] == []


def holders(function: object) -> set[str]:
    return {name for (name, _), value in loaded().items() if value is function}


def test_every_object_is_put_back() -> None:
    importlib.import_module("trl.trainer.grpo_trainer")
    before, originals = loaded(), [getattr(utils, name) for name in NAMES]
    patch()
    assert all(not holders(original) for original in originals)
    unpatch()
    check_same(before)
    unpatch()
    check_same(before)


def test_modules_imported_meanwhile_get_the_originals_back(monkeypatch: pytest.MonkeyPatch) -> None:
    experimental = importlib.import_module("trl.experimental")
    for name in [name for name in sys.modules if name.startswith("trl.experimental.cpo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(experimental, "cpo", raising=False)
    original = utils.selective_log_softmax
    before = loaded()
    patch()
    late = importlib.import_module("trl.experimental.cpo.cpo_trainer")
    assert late.selective_log_softmax is utils.selective_log_softmax is not original
    unpatch()
    assert late.selective_log_softmax is original
    check_same(before)


def test_patching_again_changes_the_plan() -> None:
    before = loaded()
    patch()
    first = utils._ChunkedLogProbFunction
    patch(uk.Plan(backend="eager"))
    assert utils._ChunkedLogProbFunction not in (first, HEAD)
    assert not holders(first)
    unpatch()
    check_same(before)


def test_context_ends_with_an_error_too() -> None:
    before = loaded()
    with pytest.raises(ZeroDivisionError), patch() as active:
        raise ZeroDivisionError
    check_same(before)
    active.undo()
    with patch():
        unpatch()
        check_same(before)
    check_same(before)


@pytest.mark.parametrize("version", ["1.9.2", "1.17.0", "2.0.0.dev0"])
def test_unknown_version_is_an_error(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = loaded()
    monkeypatch.setattr("unirl_kernels.integrations.trl.version", lambda _: version)
    with pytest.raises(RuntimeError, match=rf"trl must be of version 1.10 to 1.16, got {version}"):
        patch()
    check_same(before)


def test_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("unirl_kernels.integrations.trl.version", missing)
    with pytest.raises(ImportError, match="trl is not installed"):
        patch()


@pytest.mark.parametrize("name", ["selective_log_softmax", "entropy_from_logits", "_ChunkedLogProbFunction"])
def test_what_is_gone_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(utils, name)
    before = loaded()
    with pytest.raises(RuntimeError, match=rf"looked for {name}\(.*\) in trl.trainer.utils, found nothing of that"):
        patch()
    check_same(before)


def changed(name: str) -> Callable[..., Any]:
    def function(logits: Tensor, index: Tensor, tau: float) -> Tensor:
        return logits

    function.__name__ = name
    return function


@pytest.mark.parametrize("name", [*NAMES, "_use_triton"])
def test_what_takes_something_else_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, name, changed(name))
    before = loaded()
    with pytest.raises(RuntimeError, match=rf"looked for {name}\(.*found {name}\(logits, index, tau\)"):
        patch()
    check_same(before)


def test_replacements_take_what_the_originals_take() -> None:
    originals = {name: inspect.signature(getattr(utils, name)) for name in NAMES[:3]}
    with patch():
        for name, signature in originals.items():
            got = inspect.signature(getattr(utils, name))
            assert [(p.name, p.default) for p in got.parameters.values()] == [
                (p.name, p.default) for p in signature.parameters.values()
            ]
