"""Objectives by themselves: identities, numbers worked by hand, fp64 gradcheck, metrics, one's own objective."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME, LOSSES, SHAPES, LossCase, make_case
from tests.runners import Runner
from unirl_kernels.objectives import Clip, Tokens
from unirl_kernels.testing import oracle

SMALL = SHAPES[0]


def uniform(n_words: int, *lengths: int) -> tuple[Tensor, Tensor]:
    """Zero logits: every log-probability is -log V."""
    target = torch.full((len(lengths), max(lengths)), uk.IGNORE)
    for row, length in zip(target, lengths, strict=True):
        row[:length] = 0
    return torch.zeros(*target.shape, n_words), target


def test_sft_of_uniform_logits_is_log_v() -> None:
    logits, target = uniform(8, 3, 1)
    assert uk.fused_loss(logits, uk.Batch(target), uk.sft()).loss.item() == pytest.approx(math.log(8))


def test_every_sequence_counts_in_the_mean() -> None:
    """A sequence without tokens adds nothing and still divides."""
    logits, target = uniform(8, 3, 0)
    assert uk.fused_loss(logits, uk.Batch(target), uk.sft()).loss.item() == pytest.approx(math.log(8) / 2)


def test_rft_counts_accepted_samples_only() -> None:
    logits, target = uniform(8, 3, 2, 1, 1)
    batch = uk.Batch(target, advantage=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    for loss in (uk.rft(), uk.online_rft()):
        assert uk.fused_loss(logits, batch, loss).loss.item() == pytest.approx(math.log(8) / 2)


def test_dpo_at_the_reference_is_log_2() -> None:
    logits, batch = make_case(SMALL, BY_NAME["dpo"])
    batch = uk.Batch(batch.target, ref_logp=oracle.log_probs(logits, batch.target))
    assert uk.fused_loss(logits, batch, uk.dpo()).loss.item() == pytest.approx(math.log(2))


def test_dpo_by_hand() -> None:
    """Chosen 2 tokens, rejected 1, reference at -1 everywhere: beta (2 (1 - log 4) - (1 - log 4))."""
    logits, target = uniform(4, 2, 1)
    batch = uk.Batch(target, ref_logp=torch.full(target.shape, -1.0))
    margin = 0.5 * (1 - math.log(4))
    loss = uk.fused_loss(logits, batch, uk.dpo(beta=0.5)).loss.item()
    assert loss == pytest.approx(math.log(1 + math.exp(-margin)))
    averaged = uk.fused_loss(logits, batch, uk.dpo(beta=0.5, length_normalized=True)).loss.item()
    assert averaged == pytest.approx(math.log(2))


def test_ppo_by_hand() -> None:
    """pi = 1/4; ratios 2 and 1/2 clip to 1.2 and 0.8 where that lowers the objective."""
    logits, target = uniform(4, 1, 1, 1, 1)
    old = torch.log(torch.tensor([[0.125], [0.125], [0.5], [0.5]]))
    batch = uk.Batch(target, advantage=torch.tensor([1.0, -1.0, 1.0, -1.0]), old_logp=old)
    out = uk.fused_loss(logits, batch, uk.ppo())
    assert out.loss.item() == pytest.approx(-(1.2 - 2.0 + 0.5 - 0.8) / 4)
    assert out.metrics["clip_fraction"].item() == pytest.approx(0.5)
    assert out.metrics["ratio_mean"].item() == pytest.approx((2 + 2 + 0.5 + 0.5) / 4)


def test_grpo_at_the_reference_on_policy_is_policy_gradient() -> None:
    """r = 1 and pi = pi_ref: the coefficient is the advantage, (15)."""
    logits, batch = make_case(SMALL, BY_NAME["grpo"])
    logp = oracle.log_probs(logits, batch.target)
    leaf = logits.clone().requires_grad_()
    here = uk.Batch(batch.target, batch.advantage, None, logp)
    (d_logits,) = torch.autograd.grad(uk.fused_loss(leaf, here, uk.grpo()).loss, leaf)
    weights = batch.per_token(batch.advantage) * uk.SequenceMean().weights(batch)
    (expected,) = torch.autograd.grad(-(oracle.log_probs(leaf, batch.target) * weights).sum(), leaf)
    torch.testing.assert_close(d_logits, expected, rtol=1e-4, atol=1e-7)


def test_scaling_the_advantage_scales_the_gradient() -> None:
    logits, batch = make_case(SMALL, BY_NAME["ppo"])
    leaf = logits.clone().requires_grad_()
    once, twice = (
        torch.autograd.grad(
            uk.fused_loss(leaf, uk.Batch(batch.target, k * batch.advantage, batch.old_logp), uk.ppo()).loss, leaf
        )[0]
        for k in (1, 2)
    )
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradcheck(loss: LossCase, runner: Runner) -> None:
    if not runner.runs(loss) or (runner.interpreted and loss.name not in ("grpo", "dpo")):
        pytest.skip("not for this kernel, or hundreds of evaluations under the interpreter")
    runner.need(torch.float64)
    target = torch.tensor([[0, uk.IGNORE], [4, 3]], device=runner.device)
    fields = -torch.rand(2, 2, 2, dtype=torch.float64, device=runner.device) - 1.0
    advantage = torch.tensor([1.0, 0.0 if loss.verdicts else -0.7], dtype=torch.float64, device=runner.device)
    batch = uk.Batch(target, advantage, *fields)
    logits = torch.randn(2, 2, 5, dtype=torch.float64, device=runner.device).requires_grad_()
    made = loss.make()
    assert torch.autograd.gradcheck(lambda x: uk.fused_loss(x, batch, made, plan=runner.plan()).loss, logits)


def test_metrics() -> None:
    logits, batch = make_case(SMALL, BY_NAME["grpo"])
    out = uk.fused_loss(logits, batch, uk.grpo())
    logp = oracle.log_probs(logits, batch.target)[batch.valid]
    d = batch.ref_logp[batch.valid] - logp
    clips = {"clip_fraction", "clip_fraction/low", "clip_fraction/high"}
    assert set(out.metrics) == {"kl", "ratio_mean", "entropy", "ppo_kl"} | clips
    assert all(x.shape == () and not x.requires_grad for x in out.metrics.values())
    torch.testing.assert_close(out.metrics["kl"], (d.exp() - d - 1).mean())
    torch.testing.assert_close(out.metrics["ratio_mean"], (logp - batch.old_logp[batch.valid]).exp().mean())
    torch.testing.assert_close(out.metrics["entropy"], oracle.entropy(logits)[batch.valid].mean())


OWN_OBJECTIVE = """
import torch
import unirl_kernels as uk

def sapo_with_entropy(t):                      # Soft Adaptive Policy Optimization, and an entropy bonus
    ratio = torch.exp(t.logp - t.old_logp)
    tau = torch.where(t.advantage > 0, 1.0, 1.05)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return -gate * t.advantage - 0.01 * t.entropy
"""


def own_objective() -> object:
    namespace: dict[str, object] = {}
    exec(OWN_OBJECTIVE, namespace)
    return namespace["sapo_with_entropy"]


def test_own_objective_runs_in_one_pass(runner: Runner) -> None:
    """Defined outside the package; the entropy's gradient included, every kernel agrees with autograd in fp64."""
    loss = uk.Loss(own_objective(), uk.TokenMean())
    logits, batch = make_case(SMALL, BY_NAME["ppo"], runner.device)
    batch = uk.Batch(batch.target, batch.advantage, batch.old_logp)
    leaf = logits.clone().requires_grad_()
    out = uk.fused_loss(leaf, batch, loss, plan=runner.plan())
    (d_logits,) = torch.autograd.grad(out.loss, leaf)

    exact = logits.double().requires_grad_()
    logp, entropy = oracle.log_probs(exact, batch.target), oracle.entropy(exact)
    fields = {"old_logp": batch.old_logp.double(), "advantage": batch.per_token(batch.advantage).double()}
    t = type("t", (), {"logp": logp, "entropy": entropy, **fields})
    value = own_objective()(t)[batch.valid].mean()
    (expected,) = torch.autograd.grad(value, exact)
    torch.testing.assert_close(out.loss.double(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_logits.double(), expected, rtol=1e-4, atol=1e-6)


def test_own_objective_of_sequence_scope(runner: Runner) -> None:
    """GSPO's sequence-level ratio: two passes, by declaring a scope."""

    @dataclass(frozen=True)
    class SequenceRatio:
        scope = "sequence"

        def __call__(self, t: Tokens) -> Tensor:
            ratio = torch.exp(t.to_tokens(t.sequence_mean(t.logp - t.old_logp)))
            return -torch.minimum(ratio * t.advantage, ratio.clamp(0.9, 1.1) * t.advantage)

    for shape in SHAPES[:2]:
        logits, batch = make_case(shape, BY_NAME["ppo"], runner.device)
        leaf = logits.clone().requires_grad_()
        plan = uk.Plan(backend=runner.backend)
        (d_logits,) = torch.autograd.grad(uk.fused_loss(leaf, batch, uk.Loss(SequenceRatio()), plan=plan).loss, leaf)
        exact = logits.double().requires_grad_()
        logp = oracle.log_probs(exact, batch.target).reshape(-1)
        value = torch.zeros((), dtype=torch.float64, device=runner.device)
        for i, o in enumerate(oracle.sequences(batch)):
            if len(o):
                s = torch.exp((logp[o] - batch.old_logp.reshape(-1)[o].double()).mean())
                a = batch.advantage[i].double()
                value = value - torch.minimum(s * a, s.clamp(0.9, 1.1) * a) / batch.n_sequences
        (expected,) = torch.autograd.grad(value, exact)
        torch.testing.assert_close(d_logits.double(), expected, rtol=1e-4, atol=1e-6)


def test_unsupported_operations_name_the_way_out() -> None:
    logits, batch = make_case(SMALL, BY_NAME["ppo"])
    cases = {
        "sinh": lambda t: torch.sinh(t.logp),
        ".cos": lambda t: t.logp.cos() * t.advantage,
        "power that varies": lambda t: t.advantage.abs() ** t.entropy,
        "float16": lambda t: t.logp.to(torch.float16),
        "torch.where": lambda t: t.logp if t.advantage > 0 else -t.logp,
        "torch functions, not math": lambda t: t.logp * math.exp(t.advantage),
        "cumsum": lambda t: torch.cumsum(t.logp, 0),
        ".mean": lambda t: t.logp - t.logp.mean(),
    }
    for words, objective in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = uk.Loss(objective)
        for requires_grad in (True, False):
            leaf = logits.clone().requires_grad_(requires_grad)
            with pytest.raises(uk.UnsupportedOperation) as error:
                uk.fused_loss(leaf, batch, loss)
            assert words in str(error.value)
            assert "Plan(kernel='composed')" in str(error.value)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (lambda t: torch.cumsum(t.logp, 0), "another gradient when other tokens are left out"),
        (lambda t: t.logp - t.logp.mean(), "another loss when other tokens are left out"),
        (lambda t: t.logp / t.logp.shape[0], "another loss when other tokens are left out"),
        (lambda t: t.logp if t.advantage > 0 else -t.logp, "cannot be run on a synthetic batch"),
        (lambda t: t.logp * torch.ones(11), "cannot be run on a synthetic batch"),
        (lambda t: t.to_tokens(t.sequence_sum(t.logp)), "another loss when other tokens are left out"),
        (lambda t: None, "must return a tensor of losses, got NoneType"),
        (lambda t: t.logp.mean(), r"must return one loss per token, 11 of the synthetic batch, got shape \(\)"),
    ],
)
def test_an_objective_that_looks_beyond_a_token_is_refused_by_linear_heads(objective: object, words: str) -> None:
    message = rf"(?s)<lambda> \(.*test_objectives.py:\d+\).*{words}.*scope = 'batch'"
    with pytest.warns(UserWarning, match=message):
        loss = uk.Loss(objective)
    batch = uk.Batch(torch.tensor([[1, 2, 3]]))
    for of_sum in (loss, uk.sft() + 0.5 * loss):
        for requires_grad in (True, False):
            hidden, weight = torch.randn(1, 3, 4, requires_grad=requires_grad), torch.randn(5, 4)
            with pytest.raises(ValueError, match=message):
                uk.fused_linear_loss(hidden, weight, batch, of_sum, plan=uk.Plan(kernel="composed"))


@pytest.mark.parametrize(
    ("scope", "objective"),
    [
        ("sequence", lambda t: t.logp * t.to_tokens(t.sequence_sum(t.logp)).mean()),
        ("sequence", lambda t: t.logp.detach() + (t.logp.mean() - t.logp.mean().detach())),
        ("sequence", lambda t: t.logp * t.to_tokens(t.group_mean(t.sequence_sum(t.logp)))),
        ("pair", lambda t: t.pairs(t.sequence_sum(t.logp))[0] - t.pairs(t.sequence_sum(t.logp))[1].mean()),
        ("pair", lambda t: torch.sort(t.pairs(t.sequence_sum(t.logp))[0]).values),
    ],
)
def test_an_objective_that_looks_beyond_its_scope_is_found(scope: str, objective: object) -> None:
    objective.scope = scope
    with pytest.warns(UserWarning, match=f"of scope '{scope}' gives a .* when other {scope}s are left out"):
        uk.Loss(objective, uk.PairMean() if scope == "pair" else uk.SequenceMean())


@pytest.mark.parametrize(
    ("scope", "objective"),
    [
        ("token", lambda t: torch.sinh(t.logp) * t.advantage),
        ("token", lambda t: torch.where(t.flag, torch.cosh(t.logp), t.entropy)),
        ("sequence", lambda t: -t.to_tokens(t.sequence_mean(t.logp)) * t.advantage),
        ("sequence", lambda t: torch.where(t.to_tokens(t.sequence_field("label")), t.logp, -t.logp)),
        ("sequence", lambda t: t.sequence_scan(t.logp, 0.9, reverse=True) * t.lengths[0].clamp(max=1)),
        ("pair", lambda t: t.pairs(t.sequence_sum(t.logp))[0] - t.pairs(t.sequence_field("reward"))[1]),
        ("batch", lambda t: t.logp - t.logp.mean()),
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_objective_that_keeps_to_its_scope_is_not_refused(scope: str, objective: object) -> None:
    objective.scope = scope
    uk.Loss(objective, uk.PairMean() if scope == "pair" else uk.SequenceMean()).check_scopes()


def test_a_tensor_that_learns_gets_its_gradient_or_an_error() -> None:
    logits, batch = make_case(SMALL, BY_NAME["ppo"])
    scale = torch.nn.Parameter(torch.tensor(0.5))
    for objective in (lambda t: -scale * t.logp, lambda t: t.logp.clamp(max=2 * scale), lambda t: scale + t.logp):
        with pytest.raises(uk.UnsupportedOperation, match=r"requires a gradient.*Plan\(kernel='composed'\)"):
            uk.fused_loss(logits, batch, uk.Loss(objective))
    uk.fused_loss(logits, batch, uk.Loss(lambda t: -scale * t.logp), plan=uk.Plan(kernel="composed")).loss.backward()
    expected = -(oracle.log_probs(logits, batch.target) * uk.SequenceMean().weights(batch)).sum()
    torch.testing.assert_close(scale.grad, expected.float())


@pytest.mark.parametrize(
    "objective",
    [
        lambda t: torch.where(t.advantage > 0, 1, 0),
        lambda t: (t.advantage > 0) & (t.logp < -1),
        lambda t: t.advantage > 0,
        lambda t: torch.where(t.advantage > 0, 3, 0) * 2,
        lambda t: 0.25,
        lambda t: 3,
        lambda t: torch.tensor(0.5, dtype=torch.float64),
        lambda t: t.logp * torch.tensor([2.0]),
    ],
)
def test_the_loss_is_the_same_with_and_without_a_gradient(objective: object, runner: Runner) -> None:
    """Whatever the dtype that the objective returns: integers, truth values, Python numbers."""
    if runner.interpreted:
        pytest.skip("the same program as elsewhere")
    logits, batch = make_case(SMALL, BY_NAME["ppo"], runner.device)
    loss = uk.Loss(objective)
    trained = uk.fused_loss(logits.clone().requires_grad_(), batch, loss, plan=runner.plan()).loss
    evaluated = uk.fused_loss(logits, batch, loss, plan=runner.plan()).loss
    assert evaluated.dtype == trained.dtype
    torch.testing.assert_close(evaluated, trained.detach())


@dataclass(frozen=True)
class OfBatch:
    """An objective that sees all of the batch."""

    function: Callable[[Tokens], object]
    scope: ClassVar[str] = "batch"

    def __call__(self, t: Tokens) -> object:
        return self.function(t)


def test_what_an_objective_must_return() -> None:
    logits, batch = make_case(SMALL, BY_NAME["ppo"])
    with pytest.raises(TypeError, match="objective must return a tensor of losses, got NoneType"):
        uk.fused_loss(logits, batch, uk.Loss(OfBatch(lambda t: None)))
    with pytest.raises(ValueError, match=r"objective must return one loss per token, \d+, got \(\)"):
        uk.fused_loss(logits, batch, uk.Loss(OfBatch(lambda t: t.logp.mean())))


@pytest.mark.parametrize("count", [torch.tensor(0), torch.tensor(0.0), torch.tensor(7)])
def test_ignored_tokens_weigh_nothing_whatever_the_count(count: Tensor, runner: Runner) -> None:
    if runner.interpreted:
        pytest.skip("weights are the same everywhere")
    target = torch.full((2, 3), uk.IGNORE, device=runner.device)
    batch, loss = uk.Batch(target), uk.Loss(uk.sft().objective, uk.TokenMean(count.to(runner.device)))
    weights = loss.aggregation.weights(batch)
    assert weights.dtype == torch.float64
    assert not weights.any()
    for requires_grad in (True, False):
        logits = torch.randn(2, 3, 5, device=runner.device).requires_grad_(requires_grad)
        assert uk.fused_loss(logits, batch, loss, plan=runner.plan()).loss.item() == 0
    batch.target[0, 0] = 1
    assert uk.TokenMean(torch.tensor(7)).weights(batch)[0, 0].item() == 1 / 7


def test_a_refusal_keeps_nothing_alive() -> None:
    loss = uk.Loss(lambda t: torch.sinh(t.logp))

    def refused() -> weakref.ref[Tensor]:
        logits, batch = make_case(SMALL, BY_NAME["ppo"])
        with pytest.raises(uk.UnsupportedOperation, match="sinh"):
            uk.fused_loss(logits, batch, loss)
        return weakref.ref(logits)

    seen = refused()
    gc.collect()
    assert seen() is None


def test_the_way_out_works() -> None:
    logits, batch = make_case(SMALL, BY_NAME["ppo"])
    leaf = logits.clone().requires_grad_()
    loss = uk.Loss(lambda t: torch.sinh(t.logp / 8))
    out = uk.fused_loss(leaf, batch, loss, plan=uk.Plan(kernel="composed"))
    logp = oracle.log_probs(logits.double(), batch.target)
    expected = (torch.sinh(logp / 8) * uk.SequenceMean().weights(batch)).sum()
    torch.testing.assert_close(out.loss, expected.float())


def test_a_missing_field_is_an_error(runner: Runner) -> None:
    logits, batch = make_case(SMALL, BY_NAME["grpo"], runner.device)
    for requires_grad in (True, False):
        leaf = logits.clone().requires_grad_(requires_grad)
        with pytest.raises(ValueError, match=r"reads t\.ref_logp, but batch\.ref_logp is None"):
            uk.fused_loss(leaf, uk.Batch(batch.target, batch.advantage), uk.grpo(), plan=runner.plan())
        with pytest.raises(ValueError, match=r"reads t\.advantage, but batch\.advantage is None"):
            uk.fused_loss(leaf, uk.Batch(batch.target), uk.ppo(), plan=runner.plan())


def test_losses_are_printable_values() -> None:
    assert uk.grpo() == uk.grpo()
    assert uk.grpo() != uk.grpo(beta=0.1)
    assert repr(uk.ppo(0.3)) == "Loss(objective=Clip(low=0.3, high=0.3), aggregation=SequenceMean())"
    assert hash(uk.sft()) == hash(uk.sft())


def test_explain_shows_the_row_the_coefficient_and_the_function() -> None:
    text = str(uk.explain(uk.grpo(clip=0.25, beta=0.125)))
    for words in ("GRPO", "pi_old", "GC =", "0.75", "1.25", "0.125", "@triton.jit", "one pass"):
        assert words in text, words
    assert "two passes" in str(uk.explain(uk.dpo()))
    assert "sinh" in str(uk.explain(uk.Loss(lambda t: torch.sinh(t.logp))))
    composed = uk.explain(uk.grpo(), plan=uk.Plan(kernel="composed"))
    assert composed.schedule.startswith("two passes: the plan asks for them")
    untraced = uk.explain(uk.Loss(lambda t: torch.fft.fft(t.logp).real))
    assert "only with Plan(kernel='composed')" in untraced.schedule
    for explanation in (composed, untraced):
        assert "cpu   cpu     composed" in explanation.backends
        assert "default" not in explanation.backends


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"loss": Clip()}, "loss must be a Loss, got Clip"),
        ({"batch": 5}, "batch must be a Batch, got int"),
        ({"plan": 5}, "plan must be a Plan, got int"),
        ({"weight": 5}, r"weight must be a tensor \[V, D\], got int"),
        ({"weight": torch.ones(5)}, r"weight must be a tensor \[V, D\], got shape \(5,\)"),
    ],
)
def test_explain_refuses_other_things(given: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        uk.explain(**{"loss": uk.sft(), **given})
