"""The fused head in the place of TRL's: what it gives, its gradients, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

import transformers.integrations.deepspeed as deepspeed
import trl.trainer.utils as utils
from transformers import LlamaConfig
from transformers.modeling_outputs import BaseModelOutput

import unirl_kernels as uk
from tests.integrations.trl.heads import FUSED, HEAD, OUTPUTS, TAKEN, by_oracle, check, exact
from unirl_kernels.integrations.trl import FusedHead, patch, unpatch
from unirl_kernels.testing.budgets import error

if HEAD is None:
    pytest.skip("trl below 1.7 has no fused head", allow_module_level=True)

N, V, D = 13, 101, 24
READOUTS: dict[str, tuple[float, float | None, float]] = {
    "plain": (1.0, None, 1.0),
    "temperature": (0.7, None, 1.0),
    "softcap": (1.0, 5.0, 1.0),
    "scale": (1.0, None, 0.25),
    "all": (1.3, 3.0, 2.0),
}
ALL = ("hidden", "weight", "bias", "targets", "temperature", "chunk_size", "softcap", "scale", "outputs")
SYNONYMS = {"last_hidden": "hidden", "final_logit_softcapping": "softcap", "logit_scale": "scale"}
STATISTICS = 5 if FUSED else 2
fused = pytest.mark.skipif(not FUSED, reason="trl before 1.15 has another head")


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    yield
    unpatch()


def inputs(bias: bool) -> list[Any]:
    hidden, weight = torch.randn(N, D), 0.5 * torch.randn(V, D)
    targets = torch.randint(0, V, (N,))
    targets[::3] = (hidden @ weight.t()).argmax(-1)[::3]  # some are right
    return [hidden, weight, torch.randn(V) if bias else None, targets]


def cast(given: Sequence[Any], factors: torch.dtype, dtype: torch.dtype) -> list[Any]:
    """Inputs in a dtype, the factors rounded to another before."""
    hidden, weight, bias, targets = given
    return [
        hidden.to(factors).to(dtype),
        weight.to(factors).to(dtype),
        None if bias is None else bias.to(dtype),
        targets,
    ]


def scored(
    apply: Callable[..., Any], given: Sequence[Any], readout: Sequence[Any], takes: Sequence[str] = TAKEN
) -> list[Tensor]:
    """What a head gives, and the gradients of a loss of its log-probabilities and entropies."""
    *leaves, targets = given
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    # Two tiles of the vocabulary for TRL's own.
    values = dict(zip(ALL, (*leaves, targets, readout[0], 64, *readout[1:], ("log_probs", *OUTPUTS)), strict=True))
    outputs = apply(*(values[SYNONYMS.get(name, name)] for name in takes))
    torch.manual_seed(7)
    # TRL 1.10 has no gradient of the entropy.
    loss = sum((x.float() * torch.randn(N)).sum() for x in outputs[: 2 if "bias" in TAKEN else 1])
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return [*outputs[:STATISTICS], *grads]


@pytest.mark.parametrize("bias", [False, True] if "bias" in TAKEN else [False])
@pytest.mark.parametrize("readout", READOUTS)
def test_gives_the_same(readout: str, bias: bool) -> None:
    """Both are the oracle's head, within the budget of its fp32 form."""
    given = inputs(bias)
    plain, truth = (
        scored(by_oracle, x, READOUTS[readout], ALL) for x in (given, cast(given, torch.float64, torch.float64))
    )
    theirs = scored(HEAD.apply, given, READOUTS[readout])
    with patch():
        assert utils._ChunkedLogProbFunction is not HEAD
        ours = scored(utils._ChunkedLogProbFunction.apply, given, READOUTS[readout])
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    assert all(0 < x.sum() < N for x in truth if x.dtype is torch.bool)
    check(ours, plain, truth, STATISTICS)
    check(theirs, plain, truth, STATISTICS)


@fused
def test_is_nearer_to_the_truth_than_its_own_under_autocast() -> None:
    """TRL rounds logits to bf16. Both multiply factors of bf16, so the truth is fp64 of rounded factors."""
    given, readout = inputs(True), READOUTS["temperature"]
    plain, truth = (
        scored(by_oracle, cast(given, torch.bfloat16, x), readout, ALL) for x in (torch.float32, torch.float64)
    )
    with torch.autocast("cpu", torch.bfloat16):
        theirs = scored(HEAD.apply, given, readout)
        with patch():
            ours = scored(utils._ChunkedLogProbFunction.apply, given, readout)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    check(ours[:STATISTICS], plain[:STATISTICS], truth[:STATISTICS], STATISTICS)
    with pytest.raises(AssertionError, match="largest error"):
        check(theirs[:STATISTICS], plain[:STATISTICS], truth[:STATISTICS], STATISTICS)
    # Gradients are products of factors that both round to bf16.
    for a, b, true in zip(ours[STATISTICS:], theirs[STATISTICS:], truth[STATISTICS:], strict=True):
        assert error(a, true).relative <= 2 * error(b, true).relative


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), ("log_probs", "mean_logits", "is_top1")])
def test_gives_what_is_asked_for(outputs: tuple[str, ...]) -> None:
    given = inputs(True)
    exactly = cast(given, torch.float64, torch.float64)

    def call(apply: Callable[..., Any], given: Sequence[Any]) -> list[Any]:
        *leaves, targets = given
        leaves = [x.clone().requires_grad_() for x in leaves]
        values = apply(*leaves, targets, 0.7, 64, 5.0, 0.5, outputs)
        loss = sum(torch.sin(x).sum() for x in values[:2] if x is not None)
        return [*values, *torch.autograd.grad(loss, leaves)]

    ours, plain, truth = call(FusedHead(uk.Plan()).score, given), call(by_oracle, given), call(by_oracle, exactly)
    assert [x is None for x in ours] == [x is None for x in truth]
    ours, plain, truth = ([x for x in values if x is not None] for values in (ours, plain, truth))
    check(ours, plain, truth, len(outputs))


def test_unknown_output_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outputs must be among entropy, .*, got median"):
        FusedHead(uk.Plan()).score(*inputs(False), 1.0, 64, outputs=("log_probs", "median"))


def test_heads_of_older_versions() -> None:
    hidden, weight, bias, targets = inputs(True)
    head = FusedHead(uk.Plan())

    def check(got: Sequence[Any], *args: Any) -> None:
        expected = head.score(hidden, weight, *args, ("entropy",))
        assert [torch.equal(a, b) for a, b in zip(got, expected[:2], strict=True)] == [True, True]

    check(head.with_entropy(hidden, weight, bias, targets, 0.7, 64, 5.0, 2.0), bias, targets, 0.7, 64, 5.0, 2.0)
    check(head.without_bias(hidden, weight, targets, 0.7, 64), None, targets, 0.7, 64, None, 1.0)
    check(head.without_bias(hidden, weight, targets, 0.7, 64, 5.0, 2.0), None, targets, 0.7, 64, 5.0, 2.0)


@fused
def test_weight_of_another_dtype_takes_that_of_hidden() -> None:
    """As TRL's head does without autocast; the gradient comes back in the weight's own."""
    hidden, weight, _, targets = inputs(False)
    weight = weight.bfloat16()

    def call(apply: Callable[..., Any], hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.detach().requires_grad_()
        logp = apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, ("log_probs",))[0]
        return logp, torch.autograd.grad(logp.sum(), weight)[0]

    truth = call(by_oracle, hidden.double(), weight.double())
    theirs = call(HEAD.apply, hidden, weight)
    ours = call(FusedHead(uk.Plan()).score, hidden, weight)
    assert ours[1].dtype is torch.bfloat16
    check(ours, theirs, truth, 1)


def test_gradient_of_a_wide_weight_is_not_rounded_under_autocast() -> None:
    hidden, weight, bias, targets = inputs(True)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        logp = FusedHead(uk.Plan()).score(hidden.bfloat16(), weight, bias, targets, 1.0, 64, outputs=())[0]
    for gradient in torch.autograd.grad(logp.sum(), leaves):
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_partitioned_weight_is_refused() -> None:
    hidden, weight, _, targets = inputs(False)
    weight = torch.nn.Parameter(weight)
    weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="weight must not be partitioned by ZeRO-3"):
        FusedHead(uk.Plan()).score(hidden, weight, None, targets, 1.0, 64)


class _Backbone(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(V, D)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return BaseModelOutput(last_hidden_state=self.embedding(input_ids))


class _Model(torch.nn.Module):
    """What ``add_fused_lm_head`` asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model, self.head, self.config = _Backbone(), torch.nn.Linear(D, V), LlamaConfig()

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor) -> Any:
        raise AssertionError("the fused head takes its place")


@fused
def test_partitioned_models_are_refused_where_a_trainer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    utils.add_fused_lm_head(_Model())  # type: ignore[arg-type]
    with patch(), pytest.raises(ValueError, match="weight must not be partitioned by ZeRO-3"):
        utils.add_fused_lm_head(_Model())  # type: ignore[arg-type]


@fused
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

    def step() -> list[Tensor]:
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss + 0.1 * out.entropy.sum()).backward()
        return [*out.values(), *(p.grad.clone() for p in model.parameters())]

    theirs = step()
    with exact():
        truth = step()
    with patch():
        ours = step()
    assert rows == [12 if ignored == "some" else 0]
    check(ours, theirs, truth, len(ours) - len(list(model.parameters())))
    grads = ours[-len(list(model.parameters())) :]
    assert all(bool(grad.any()) == (ignored == "some") for grad in grads)
