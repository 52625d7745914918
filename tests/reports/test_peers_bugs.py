"""Where other implementations of these losses are or were wrong, each as a test of this one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.places import PLACES, Place
from unirl_kernels.backends import COMPOSED
from unirl_kernels.testing import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
of_every_backend = pytest.mark.parametrize("place", [p for p in PLACES if p.kernel == COMPOSED], ids=str)
"""Statistics are the same for every one-pass kernel."""


def statistics(logits: Tensor, target: Tensor, place: Place) -> tuple[Tensor, uk.TokenStats]:
    leaf = logits.to(place.device).requires_grad_()
    return leaf, uk.token_stats(leaf, target.to(place.device), plan=uk.Plan(place.backend))


def one_token(logits: Tensor, place: Place, **fields: float | Tensor) -> tuple[Tensor, uk.Batch]:
    """[T, V] logits as T sequences of one token, whose target is word 0; a field for all or for each."""
    shape = (len(logits), 1)
    values = {name: torch.as_tensor(x).float().view(-1, 1).expand(shape).contiguous() for name, x in fields.items()}
    values["target"] = torch.zeros(shape, dtype=torch.int64)
    return logits.unsqueeze(1).to(place.device), uk.Batch(**{name: x.to(place.device) for name, x in values.items()})


def gradient(logits: Tensor, batch: uk.Batch, loss: uk.Loss, plan: uk.Plan) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    (d_logits,) = torch.autograd.grad(uk.fused_loss(leaf * 1, batch, loss, plan=plan).loss, leaf)
    return d_logits


@of_every_backend
def test_upstream_gradients_at_padding_are_ignored(place: Place) -> None:
    """Liger-Kernel's sequence-level GRPO summed the upstream gradient over the padding, too."""
    logits, target = torch.randn(2, 3, 33), torch.randint(0, 33, (2, 3))
    target[0, 2] = target[1, 0] = uk.IGNORE
    used = (target != uk.IGNORE).to(place.device)
    found = []
    for upstream in (used.float(), torch.where(used, 1.0, 1e30), torch.where(used, 1.0, math.nan)):
        leaf, stats = statistics(logits, target, place)
        found.append(torch.autograd.grad(stats.logp, leaf, upstream)[0])
    assert not found[0][~used].any()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@of_every_backend
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_upstream_gradients_of_any_strides(layout: str, place: Place) -> None:
    """Liger-Kernel's LUSPO indexes a (B, 1) upstream gradient as if it were (B, L): it reads beyond its end."""
    logits, target = torch.randn(2, 3, 33), torch.randint(0, 33, (2, 3))
    one_each = torch.tensor([[2.0], [-3.0]], device=place.device)
    upstream = one_each.expand(2, 3) if layout == "expanded" else one_each.expand(2, 3).t().contiguous().t()
    assert not upstream.is_contiguous()
    found = []
    for d_logp in (upstream, upstream.contiguous()):
        leaf, stats = statistics(logits, target, place)
        found.append(torch.autograd.grad((stats.logp, stats.entropy), leaf, (d_logp, d_logp))[0])
    assert torch.equal(*found)
    assert found[0][1].abs().sum() > found[0][0].abs().sum() > 0


def two_sided(t: object) -> Tensor:
    """The clip with a bound for negative advantages, too (INTELLECT-2): -min(min(r, delta) A, clip(r) A)."""
    ratio = torch.exp(t.logp - t.old_logp)
    return -torch.minimum(ratio.clamp(max=1.1) * t.advantage, ratio.clamp(0.8, 1.2) * t.advantage)


# On each side of each bound, for both signs of the advantage: -d loss / d logp by hand, r A where the ratio's own
# gradient flows, 0 where a bound holds. delta = 1.1 lies below 1 + 0.2, where Liger-Kernel's backward takes the wrong
# branch for a negative advantage.
RATIOS = (0.5, 1.05, 1.15, 1.5)
COEFFICIENTS = {
    "ppo": {2.0: (1.0, 2.1, 2.3, 0.0), -2.0: (0.0, -2.1, -2.3, -3.0)},
    "two_sided": {2.0: (1.0, 2.1, 0.0, 0.0), -2.0: (0.0, -2.1, -2.3, 0.0)},
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_every_side_of_the_clip(name: str, place: Place) -> None:
    loss = {"ppo": uk.ppo(0.2), "two_sided": uk.Loss(two_sided)}[name]
    for advantage, coefficients in COEFFICIENTS[name].items():
        rows = torch.randn(len(RATIOS), 17)
        old_logp = torch.log_softmax(rows, -1)[:, 0] - torch.tensor(RATIOS).log()
        logits, batch = one_token(rows, place, advantage=advantage, old_logp=old_logp)
        one_hot = torch.nn.functional.one_hot(torch.zeros(len(RATIOS), dtype=torch.int64), 17)
        gc = torch.tensor(coefficients, dtype=torch.float64).unsqueeze(-1)
        expected = gc * (torch.softmax(rows.double(), -1) - one_hot) / len(RATIOS)
        found = gradient(logits, batch, loss, place.plan()).double().cpu().squeeze(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_ratio_used_twice_is_differentiated_twice(place: Place) -> None:
    """Liger-Kernel forgot the gradient through the ratio that its corrected KL shares with the surrogate."""

    def corrected(t: object) -> Tensor:
        ratio, gap = torch.exp(t.logp - t.old_logp), t.ref_logp - t.logp
        return -ratio * t.advantage + ratio * (torch.exp(gap) - gap - 1)

    logits, batch = one_token(torch.randn(1, 17), place, advantage=0.7, old_logp=-3.0, ref_logp=-2.0)
    exact = logits.double().requires_grad_()
    fields = {"old_logp": batch.old_logp, "ref_logp": batch.ref_logp, "advantage": batch.advantage}
    t = type("t", (), {"logp": oracle.log_probs(exact, batch.target), **fields})
    (expected,) = torch.autograd.grad(corrected(t).sum(), exact)
    found = gradient(logits, batch, uk.Loss(corrected), place.plan())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_backward_is_right_or_refused(overwrite: bool, place: Place) -> None:
    """With Liger-Kernel's defaults it returns the gradient of a gradient, without a word."""
    logits, batch = one_token(torch.randn(2, 33), place, advantage=1.0)
    leaf = logits.clone().requires_grad_()
    value = 3 * uk.fused_loss(leaf * 1, batch, uk.ppo(), plan=place.plan(overwrite_logits=overwrite)).loss
    (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
    first = first.clone()
    try:
        (second,) = torch.autograd.grad(value, leaf)
    except RuntimeError:
        assert overwrite, "a kept graph must serve again"
    else:
        torch.testing.assert_close(second, first)


def test_a_leaf_is_never_overwritten(place: Place) -> None:
    """Liger-Kernel's in-place default destroys a leaf's data."""
    logits, batch = one_token(torch.randn(2, 33), place, advantage=1.0)
    leaf = logits.clone().requires_grad_()
    uk.fused_loss(leaf, batch, uk.ppo(), plan=place.plan()).loss.backward()
    assert torch.equal(leaf.detach(), logits)
    with pytest.raises(ValueError, match="leaf"):
        uk.fused_loss(leaf, batch, uk.ppo(), plan=place.plan(overwrite_logits=True))
    assert torch.equal(leaf.detach(), logits)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_a_sure_target(dtype: torch.dtype, overwrite: bool, place: Place) -> None:
    """As p_y -> 1 the target's entry, p_y - 1, is small. Where Liger-Kernel's cross entropy once read, corrected and
    wrote it back in bf16, it was wrong by up to 100 % at p_y = 0.999."""
    row = torch.randn(4, 300)
    row[:, 0] = torch.tensor([8.0, 10.0, 12.0, 16.0])
    logits, batch = one_token(row.to(dtype), place)
    rest = torch.logsumexp(logits.double()[..., 1:], -1)
    expected = -torch.sigmoid(rest - logits.double()[..., 0]) / len(row)
    plan = place.plan(overwrite_logits=overwrite)
    found = gradient(logits, batch, uk.sft(), plan)[..., 0].double()
    # Half an ulp of the result, and two of lse in fp32, from which it comes.
    lse = torch.logsumexp(logits.double(), -1)
    allowed = torch.finfo(dtype).eps / 2 * expected.abs() + 2 * torch.finfo(torch.float32).eps * lse / len(row)
    assert ((found - expected).abs() <= allowed).all()


@of_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logp_is_never_positive(dtype: torch.dtype, place: Place) -> None:
    """Rounded up to 0.06 it makes ratios above 1 from nothing, in peers that add up in the logits' dtype."""
    row = torch.randn(8, 1001)
    row[:, 0] = torch.linspace(5, 60, 8)
    logits, batch = one_token(row.to(dtype), place)
    _, stats = statistics(logits, batch.target, place)
    assert (stats.logp <= 0).all()
    assert (stats.entropy >= 0).all()
    expected = oracle.log_probs(logits.double(), batch.target)
    torch.testing.assert_close(stats.logp.detach().double(), expected, rtol=0, atol=1e-5)


@of_every_backend
@pytest.mark.parametrize("shift", [-1e4, -300.0, 300.0, 1e4])
def test_shifted_logits(shift: float, place: Place) -> None:
    """A running maximum that starts at 0 lets everything underflow where all logits lie below -88 (verl's kernel)."""
    row = torch.randint(-16, 16, (2, 300)).float() / 4  # so that the shift is exact
    target = torch.tensor([[3], [7]])
    leaf, stats = statistics((row + shift).unsqueeze(1), target, place)
    found = [stats.logp, stats.entropy, *torch.autograd.grad((stats.logp + stats.entropy).sum(), leaf)]
    exact = row.double().unsqueeze(1).requires_grad_()
    expected = [oracle.log_probs(exact, target), oracle.entropy(exact)]
    expected += torch.autograd.grad((expected[0] + expected[1]).sum(), exact)
    for got, truth in zip(found, expected, strict=True):
        # logp = z_y - lse: an ulp of each.
        atol = 1e-5 + 2 * abs(shift) * torch.finfo(torch.float32).eps
        torch.testing.assert_close(got.detach().double().cpu(), truth.detach(), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("vocab", [1, 2, 255, 257, 1187, 2049, 9496])
def test_no_column_is_left_out(vocab: int, place: Place) -> None:
    """Liger-Kernel's newest row kernel takes multiples of 256 only; here the last columns weigh as much as the first.
    9496 is Qwen's vocabulary over 16 GPUs."""
    logits, batch = one_token(torch.zeros(1, vocab), place, advantage=1.0)
    found = gradient(logits, batch, uk.ppo(), place.plan()).cpu().view(-1)
    expected = torch.full((vocab,), 1 / vocab)
    expected[0] -= 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@of_every_backend
def test_entropy_with_impossible_words(place: Place) -> None:
    """0 * -inf is NaN where p log p is computed as written (TRL's entropy_from_logits)."""
    row = torch.full((1, 1, 300), -math.inf)
    row[..., :4] = torch.tensor([1.0, 0.5, 0.0, -1.0])
    leaf, stats = statistics(row, torch.zeros(1, 1, dtype=torch.int64), place)
    (d_logits,) = torch.autograd.grad(stats.entropy.sum(), leaf)
    few = row[..., :4].double().requires_grad_()
    expected = oracle.entropy(few)
    torch.testing.assert_close(stats.entropy.detach().double().cpu(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        d_logits[..., :4].double().cpu(), *torch.autograd.grad(expected.sum(), few), rtol=1e-5, atol=1e-7
    )
    assert not d_logits[..., 4:].any()


def test_a_sequence_of_more_than_65535_tokens(place: Place) -> None:
    """A grid's second dimension ends there: Liger-Kernel's GRPO crashes."""
    if place.interpreted or place.emulated:
        pytest.skip("65537 rows take the interpreter half an hour, the emulator two minutes")
    logits = torch.randn(1, 65537, 3)
    batch = uk.Batch(torch.randint(0, 3, (1, 65537)), torch.tensor([1.0]))
    batch = uk.Batch(batch.target.to(place.device), batch.advantage.to(place.device))
    found = gradient(logits.to(place.device), batch, uk.ppo(), place.plan())
    expected = oracle.gradient("ppo", logits.to(place.device).double(), batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-10)
