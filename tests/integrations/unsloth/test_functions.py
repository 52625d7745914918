"""unsloth's functions of a vocabulary and this package's in their place: values and gradients within budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("unsloth", reason="unsloth is not installed: make test-trainers")

import unsloth_zoo.cpu.ops as on_cpu
import unsloth_zoo.fused_losses.chunked_logprob as chunked
import unsloth_zoo.fused_losses.fused_linear as linear
import unsloth_zoo.rl_replacements as scores

from unirl_kernels.integrations import unsloth
from unirl_kernels.objectives import TokenMean
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations

B, L, D, V = 4, 33, 48, 211

Leaves = list[Tensor]
Run = Callable[[Leaves], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    yield
    unsloth.unpatch()


@pytest.fixture
def target() -> Tensor:
    return torch.randint(V, (B, L))


def leaves() -> Leaves:
    """Hidden states, the weight of a head, and its bias, float64."""
    return [torch.randn(B, L, D).double(), 0.3 * torch.randn(V, D).double(), torch.randn(V).double()]


def results(run: Run, given: Leaves, dtype: torch.dtype, off: float = 1.0) -> tuple[Tensor, ...]:
    """Values, and the gradients of a sum of those that have one, with other weights, that is multiplied."""
    own = [x.to(dtype).requires_grad_() for x in given]
    values = run(own)
    graph = [x for x in values if x.requires_grad]
    total = sum((x.double() * torch.linspace(0.5, 2.0, x.numel()).view(x.shape)).sum() for x in graph)
    used = torch.autograd.grad(off * total, own, allow_unused=True)
    return *(x.detach() for x in values), *(x for x in used if x is not None)


def slope(got: Tensor, true: Tensor) -> float:
    """By how much a gradient is too large; rounding of its elements does not show in it."""
    return ((got.double() * true).sum() / (true * true).sum()).item() - 1


def problems(
    own: Run, exact: Run, dtype: torch.dtype, n_values: int, off: float = 1.0, given: Leaves | None = None
) -> list[str]:
    """In what a patched function is further from fp64 than unsloth's own, with gradients that are multiplied."""
    given = [x.to(dtype).double() for x in given or leaves()]
    true, plain = results(exact, given, torch.float64), results(own, given, dtype)
    with unsloth.patch():
        got = results(own, given, dtype, off)
    assert len(got) == len(plain) == len(true) > n_values
    found = []
    for k, (a, b, c) in enumerate(zip(got, plain, true, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if b.dtype is torch.bool:
            found += [] if torch.equal(a, c) else [f"{k}: {(a != c).sum()} differ"]
            continue
        condition = condition_of(c, 20.0) if k < n_values else 20.0
        found += [f"{k}: {x}" for x in violations(a, b, c.double(), condition=condition)]
        if k >= n_values and abs(slope(a, c)) > 3e-4 + 2 * abs(slope(b, c)):
            found.append(f"{k}: too large by {slope(a, c):.2g}")
    return found


READOUTS: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "all": {"temperature": 1.3, "logit_softcapping": 5.0, "logit_scale_multiply": 0.5, "logit_scale_divide": 0.4},
}


def distribution(
    logits: Tensor,
    temperature: float = 1.0,
    logit_scale_multiply: float = 1.0,
    logit_scale_divide: float = 1.0,
    logit_softcapping: float | None = None,
) -> Tensor:
    return oracle.apply_readout(logits, temperature, logit_softcapping, logit_scale_multiply / logit_scale_divide)


def scored(target: Tensor, mask: Tensor | None, readout: dict[str, float]) -> tuple[Run, Run]:
    """The function that unsloth's trainers score hidden states by, and the same in fp64."""
    seen = {"return_entropy": True, "return_mean_logits": True}
    more = {"return_log_sum_sq_probs": True, "return_is_top1": True}

    def own(given: Leaves) -> tuple[Tensor, ...]:
        hidden, weight, bias = given
        found: tuple[Tensor, ...] = linear.fused_linear_logprobs(
            hidden, weight, target, bias=bias, mask=mask, **readout, **seen, **more
        )
        return found

    def exact(given: Leaves) -> tuple[Tensor, ...]:
        hidden, weight, bias = given
        raw = hidden @ weight.t() + bias
        z = distribution(raw, **readout)
        counts = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.bool()
        values = (
            oracle.log_probs(z, target),
            oracle.entropy(z),
            z.detach().mean(-1) * readout.get("temperature", 1.0),
            (2 * z.detach().log_softmax(-1)).logsumexp(-1),
        )
        return *(torch.where(counts, x, 0) for x in values), (z.argmax(-1) == target) & counts

    return own, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", READOUTS)
def test_hidden_states_are_scored_as_by_its_own(name: str, masked: bool, dtype: torch.dtype, target: Tensor) -> None:
    mask = torch.rand(B, L) < 0.7 if masked else None
    own, exact = scored(target, mask, READOUTS[name])
    assert problems(own, exact, dtype, 5) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_a_thousandth_too_large_shows(dtype: torch.dtype, target: Tensor) -> None:
    own, exact = scored(target, None, READOUTS["all"])
    found = problems(own, exact, dtype, 5, off=1.001)
    assert {line[0] for line in found if "too large" in line} >= {"5", "6"}, found


def log_probs_of_hidden_states(readout: dict[str, float]) -> dict[str, Callable[..., Tensor]]:
    """What else unsloth's trainers call, which ends in the same function; each [B, L]."""

    def by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda hidden, weight, index, bias: function(hidden, weight, index, lm_head_bias=bias, **readout)

    return {
        "grpo": by(scores.grpo_chunked_hidden_states_logprobs),
        "older grpo": by(scores.chunked_hidden_states_selective_log_softmax),
        "recompute": by(scores.chunked_hidden_states_selective_log_softmax_recompute),
        "preference": by(chunked.unsloth_masked_logprobs),
    }


@pytest.mark.parametrize("name", log_probs_of_hidden_states({}))
def test_what_trainers_call_ends_in_these_kernels(name: str, target: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    readout = READOUTS["all"]
    calls: list[str] = []
    score = unsloth.Functions.fused_linear_logprobs

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return score(*args, **kwargs)

    monkeypatch.setattr(unsloth.Functions, "fused_linear_logprobs", noted)

    def own(given: Leaves) -> tuple[Tensor, ...]:
        return (log_probs_of_hidden_states(readout)[name](given[0], given[1], target, given[2]),)

    def exact(given: Leaves) -> tuple[Tensor, ...]:
        z = distribution(given[0] @ given[1].t() + given[2], **readout)
        return (oracle.log_probs(z, target),)

    assert problems(own, exact, torch.float32, 1) == []
    assert calls == [name]


def losses(target: Tensor, readout: dict[str, float], divisor: float) -> tuple[Run, Run]:
    """SFT's loss on GPUs, over targets of which some do not count, and the same in fp64."""

    def own(given: Leaves) -> tuple[Tensor, ...]:
        how = {"divisor": torch.tensor([divisor]), **readout}
        return (linear.fused_linear_cross_entropy(*given, target, **how),)

    def exact(given: Leaves) -> tuple[Tensor, ...]:
        z = distribution(given[0] @ given[1].t() + given[2], **readout)
        logp = oracle.log_probs(z, target.clamp(min=0))
        return (-torch.where(target >= 0, logp, 0).sum() / (divisor or 1.0),)

    return own, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("off", [1.0, 1.001])
def test_the_loss_is_its_own(off: float, dtype: torch.dtype, target: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    # A gradient that was made in the forward, in 16 bits, would hide the fault if it came from behind.
    monkeypatch.setattr(unsloth, "TokenMean", lambda count: TokenMean(count / off))
    target[0, :9] = target[2, 20:] = -100
    readout = {name: x for name, x in READOUTS["all"].items() if name != "temperature"}
    for divisor in (7.0, 0.0):
        own, exact = losses(target, readout, divisor)
        found = problems(own, exact, dtype, 1)
        assert {line[0] for line in found if "too large" in line} >= {"1", "2"} if off != 1 else found == [], found


def test_the_loss_in_fp16_with_a_scale() -> None:
    """A gradient that fp16 could not hold comes out right, when the loss is scaled as GradScaler does."""
    hidden, weight = torch.randn(64, D), 0.3 * torch.randn(V, D)
    target, scale = torch.randint(V, (64,)), torch.tensor(2.0**16)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = hidden.half().to(dtype).requires_grad_()
        given = {"divisor": 2.0**20, "scaling": scale}
        loss = linear.fused_linear_cross_entropy(leaf, weight.half().to(dtype), None, target, **given)
        (found,) = torch.autograd.grad(scale * loss, leaf)
        return found

    plain = gradient(torch.float16)
    leaf = hidden.half().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(leaf @ weight.half().double().t(), target, reduction="sum")
    (true,) = torch.autograd.grad(exact * 2.0**-4, leaf)
    with unsloth.patch():
        got = gradient(torch.float16)
    assert not violations(got, plain, true, condition=4.0)


@pytest.mark.parametrize("off", [1.0, 1.001])
@pytest.mark.parametrize("items", [None, 50, torch.tensor(50)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_of_training_on_a_cpu_is_its_own(shifted: bool, items: Any, off: float, target: Tensor) -> None:
    target[0, :9] = target[2, 20:] = 7

    def own(given: Leaves) -> tuple[Tensor, ...]:
        labels = {"labels": None, "shift_labels": target} if shifted else {"labels": target}
        how = {"num_items_in_batch": items, "ignore_index": 7}
        return (on_cpu.chunked_linear_cross_entropy(given[0], given[1], **labels, **how),)

    def exact(given: Leaves) -> tuple[Tensor, ...]:
        scored = target if shifted else torch.nn.functional.pad(target[:, 1:], (0, 1), value=7)
        logp = oracle.log_probs(given[0] @ given[1].t(), scored)
        count = (scored != 7).sum() if items is None else 50
        return (-torch.where(scored != 7, logp, 0).sum() / count,)

    found = problems(own, exact, torch.float32, 1, off=off)
    assert {line[0] for line in found} >= {"1", "2"} if off != 1 else found == [], found


def test_no_label_on_a_cpu_is_not_a_number_as_before() -> None:
    hidden, weight, labels = torch.randn(1, 3, D, requires_grad=True), torch.randn(V, D), torch.full((1, 3), -100)
    for patched in (unsloth.patch, unsloth.unpatch):
        patched()
        loss = on_cpu.chunked_linear_cross_entropy(hidden, weight, labels)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.isnan()
        assert not gradient.any()


@pytest.mark.parametrize("off", [1.0, 1.001])
def test_the_fused_head_of_training_on_a_cpu_is_its_own(off: float, target: Tensor) -> None:
    rows, names = target.reshape(-1), ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def own(given: Leaves) -> tuple[Tensor, ...]:
        hidden, weight, bias = given
        found = on_cpu.cpu_chunked_log_probs(hidden.flatten(0, 1), weight, bias, rows, 1.3, 256, 5.0, 0.5, names)
        return tuple(found)

    def exact(given: Leaves) -> tuple[Tensor, ...]:
        z = oracle.apply_readout((given[0] @ given[1].t() + given[2]).flatten(0, 1), 1.3, 5.0, 0.5)
        frozen = z.detach()
        seen = (2 * frozen.log_softmax(-1)).logsumexp(-1), frozen.mean(-1), frozen.argmax(-1) == rows
        return oracle.log_probs(z, rows), oracle.entropy(z), *seen

    found = problems(own, exact, torch.float32, 5, off=off)
    assert {line[0] for line in found} >= {"5", "6", "7"} if off != 1 else found == [], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("off", [1.0, 1.001])
def test_logits_are_scored_as_by_its_own(off: float, dtype: torch.dtype, target: Tensor) -> None:
    def own(given: Leaves) -> tuple[Tensor, ...]:
        return (scores.chunked_selective_log_softmax(given[0], target, temperature=0.7),)

    def exact(given: Leaves) -> tuple[Tensor, ...]:
        return (oracle.log_probs(given[0] / 0.7, target),)

    found = problems(own, exact, dtype, 1, off=off, given=[2 * torch.randn(B, L, V).double()])
    assert {line[0] for line in found} == {"1"} if off != 1 else found == [], found


OWN = [
    *({"support_top_k": 5}, {"support_top_p": 0.5}, {"support_min_p": 0.1}),
    {"support_excluded_ids": torch.tensor([1, 2])},
]


@pytest.mark.parametrize("option", OWN, ids=lambda option: next(iter(option)))
def test_a_part_of_the_vocabulary_is_its_own(option: dict[str, Any], target: Tensor) -> None:
    logits, hidden, weight = torch.randn(B, L, V), torch.randn(B, L, D), torch.randn(V, D)
    functions: list[Callable[[], Tensor]] = [
        lambda: scores.chunked_selective_log_softmax(logits, target, **option),
        lambda: scores.grpo_chunked_hidden_states_logprobs(hidden, weight, target, **option),
        lambda: scores.chunked_hidden_states_selective_log_softmax(hidden, weight, target, **option),
    ]
    plain = [function() for function in functions]
    unsloth.patch()
    assert all(torch.equal(function(), x) for function, x in zip(functions, plain, strict=True))
    unsloth.unpatch()
    whole = scores.chunked_selective_log_softmax(logits, target)
    assert not torch.equal(plain[0], whole)


@pytest.mark.parametrize("option", [{"label_smoothing": 0.1}, {"logits_bias": torch.linspace(-1, 1, V)}], ids=str)
def test_another_loss_is_its_own(option: dict[str, Any], target: Tensor) -> None:
    def loss() -> Tensor:
        found: Tensor = linear.fused_linear_cross_entropy(hidden, weight, None, target, divisor=3.0, **option)
        return found

    hidden, weight = torch.randn(B, L, D), torch.randn(V, D)
    plain = loss()
    unsloth.patch()
    assert torch.equal(loss(), plain)


def test_compiled_into_one_graph(target: Tensor) -> None:
    def both(hidden: Tensor, weight: Tensor, divisor: Tensor) -> Tensor:
        logp, entropy = linear.fused_linear_logprobs(hidden, weight, target, return_entropy=True, temperature=0.7)
        return (
            logp.sum()
            + entropy.mean()
            + linear.fused_linear_cross_entropy(hidden, weight, None, target, divisor=divisor, logit_softcapping=5.0)
        )

    hidden, weight = torch.randn(B, L, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with unsloth.patch():
        plain = both(hidden, weight, torch.tensor(3.0))
        got = torch.compile(both, fullgraph=True, backend="aot_eager")(hidden, weight, torch.tensor(3.0))
    torch.testing.assert_close(got, plain)
    gradients = (torch.autograd.grad(x, (hidden, weight)) for x in (got, plain))
    torch.testing.assert_close(*gradients)


def test_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_FUSED_LINEAR", "0")
    own = linear.fused_linear_logprobs
    with pytest.raises(ValueError, match=r"^UNSLOTH_FUSED_LINEAR must not be 0"):
        unsloth.patch()
    assert linear.fused_linear_logprobs is own
