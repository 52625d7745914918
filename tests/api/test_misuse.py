"""Common mistakes raise an error that says what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from unirl_kernels.objectives import Clip, PairMean

V = 9
TARGET = torch.tensor([[1, 2, 3], [4, uk.IGNORE, 5]])
BATCH = uk.Batch(TARGET, advantage=torch.ones(2))
OVERWRITING = uk.Plan(overwrite_logits=True)


def logits(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, V))).requires_grad_()


CALLS: dict[str, tuple[Any, str]] = {
    "target for batch": (lambda: uk.fused_loss(logits(), TARGET, uk.sft()), "batch must be a Batch, got Tensor"),
    "recipe for loss": (lambda: uk.fused_loss(logits(), BATCH, uk.grpo), "loss must be a Loss, got function"),
    "objective for loss": (
        lambda: uk.fused_loss(logits(), BATCH, uk.grpo().objective),
        "loss must be a Loss, got PolicyGradient",
    ),
    "temperature for readout": (
        lambda: uk.fused_loss(logits(), BATCH, uk.sft(), readout=0.7),
        "readout must be a Readout, got float",
    ),
    "backend for plan": (lambda: uk.token_stats(logits(), TARGET, plan="cpu"), "plan must be a Plan, got str"),
    "plan of a linear head": (
        lambda: uk.fused_linear_loss(logits(2, 3, 4), logits(V, 4), BATCH, uk.sft(), plan=None),
        "plan must be a Plan, got NoneType",
    ),
    "temperature": (lambda: uk.Readout("hot"), "temperature must be a number, got str"),
    "dtype of the temperature": (
        lambda: uk.Readout(torch.ones(2, dtype=torch.bfloat16)),
        "temperature must be a float32 or float64 tensor, got torch.bfloat16",
    ),
    "softcap": (lambda: uk.Readout(softcap="30"), "softcap must be a number, got str"),
    "scale": (lambda: uk.Readout(scale=torch.nn.Parameter(torch.ones(()))), "scale must be a number, got Parameter"),
    "bytes": (lambda: uk.Plan(max_chunk_bytes=1e6), r"max_chunk_bytes must be an int, got 1000000\.0"),
    "flag": (lambda: uk.Plan(overwrite_logits="no"), "overwrite_logits must be True or False, got 'no'"),
}


@pytest.mark.parametrize("call", CALLS)
def test_another_kind_of_argument(call: str) -> None:
    function, message = CALLS[call]
    with pytest.raises(TypeError, match=message):
        function()


class OfSequences:
    """A wrong aggregation: it returns one weight per sequence instead of one per token."""

    def weights(self, batch: uk.Batch) -> Tensor:
        return torch.ones(batch.n_sequences)


HINTS: dict[str, tuple[Any, str]] = {
    "4-D logits": (
        lambda: uk.token_stats(logits(1, 2, 3, V), TARGET),
        "logits must have shape (2, 3, V), got (1, 2, 3, 9); fold its first dimensions into the batch: "
        "logits.flatten(0, -3), and target's likewise",
    ),
    "4-D hidden states": (
        lambda: uk.linear_token_stats(logits(1, 2, 3, 4), logits(V, 4), TARGET),
        "hidden must have shape (2, 3, D), got (1, 2, 3, 4); fold its first dimensions into the batch: "
        "hidden.flatten(0, -3), and target's likewise",
    ),
    "3-D target": (
        lambda: uk.token_stats(logits(1, 2, 3, V), TARGET.unsqueeze(0)),
        "target must have shape [B, L] or [T], got (1, 2, 3); fold its first dimensions into the batch: "
        "target.flatten(0, -2)",
    ),
    "3-D target of a batch": (
        lambda: uk.Batch(TARGET.unsqueeze(0)),
        "target must have shape [B, L] or [T], got (1, 2, 3); fold its first dimensions into the batch: "
        "target.flatten(0, -2)",
    ),
    "1-D logits": (
        lambda: uk.token_stats(logits(V), torch.tensor([3])),
        "logits must have shape (1, V), got (9,); a single position is logits.unsqueeze(0)",
    ),
    "1-D hidden states": (
        lambda: uk.linear_token_stats(logits(4), logits(V, 4), torch.tensor([3])),
        "hidden must have shape (1, D), got (4,); a single position is hidden.unsqueeze(0)",
    ),
    "0-D target": (
        lambda: uk.token_stats(logits(V), torch.tensor(3)),
        "target must have shape [B, L] or [T], got ()",
    ),
    "weights of sequences": (
        lambda: uk.fused_loss(logits(), BATCH, uk.Loss(Clip(), OfSequences())),
        "must give a weight for each token, (2, 3), got (2,); batch.per_token spreads one per sequence",
    ),
    "weights of sequences, of a head": (
        lambda: uk.fused_linear_loss(logits(2, 3, 4), logits(V, 4), BATCH, uk.Loss(Clip(), OfSequences())),
        "must give a weight for each token, (2, 3), got (2,); batch.per_token spreads one per sequence",
    ),
}


@pytest.mark.parametrize("call", HINTS)
def test_an_error_of_shape_says_the_way_out(call: str) -> None:
    function, message = HINTS[call]
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        function()


def test_the_way_out_of_an_error_of_shape_works() -> None:
    x, target = logits(2, 1, 3, V), TARGET.unsqueeze(1)
    whole = uk.token_stats(x.flatten(0, -3), target.flatten(0, -2)).logp
    torch.testing.assert_close(whole, uk.token_stats(x[:, 0], TARGET).logp, rtol=0, atol=0)
    assert uk.token_stats(x[0, 0, 0].unsqueeze(0), torch.tensor([3])).logp.shape == (1,)

    class Spread(OfSequences):
        def weights(self, batch: uk.Batch) -> Tensor:
            return batch.per_token(super().weights(batch))

    spread = uk.fused_loss(x[:, 0], BATCH, uk.Loss(Clip(), Spread())).loss
    torch.testing.assert_close(spread, 5 * uk.fused_loss(x[:, 0], BATCH, uk.Loss(Clip(), uk.TokenMean())).loss)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_a_nested_target_is_a_packed_batch(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=layout)
    with pytest.raises(TypeError, match=r"target must be a dense tensor, got a nested tensor: pack it, with cu"):
        uk.Batch(nested)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uk.ppo(clip=-0.1), r"low must lie in \[0, 1\], got -0.1"),
        (lambda: uk.ppo(clip=(0.1, -1)), "high must be at least 0, got -1"),
        (lambda: uk.grpo(beta=-1), "beta must be at least 0, got -1"),
        (lambda: uk.dpo(beta=0), "beta must be positive, got 0"),
        (lambda: uk.FixedLength(0), "n must be positive, got 0"),
        (lambda: uk.TokenMean(0), "count must be positive, got 0"),
        (lambda: uk.TokenMean(torch.ones(2)), r"count must be a 0-dim tensor, got shape \(2,\)"),
        (lambda: uk.TokenMean(torch.ones((), requires_grad=True)), "count must not require a gradient"),
        (lambda: uk.Loss(Clip(), PairMean()), "aggregation of a token-scope objective cannot be PairMean"),
        (lambda: uk.Loss(uk.dpo().objective), "aggregation of a pair-scope objective cannot be SequenceMean"),
        (lambda: uk.Readout(temperature=0.0), "temperature must be positive and finite, got 0.0"),
        (lambda: uk.Readout(softcap=-1.0), "softcap must be positive and finite, got -1.0"),
        (lambda: uk.Readout(scale=0.0), "scale must be finite and not 0, got 0.0"),
        (lambda: uk.Plan(max_chunk_bytes=0), "max_chunk_bytes must be positive, got 0"),
    ],
)
def test_impossible_values_fail_when_made(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_clip_is_one_number_or_two() -> None:
    assert uk.ppo([0.2, 0.3]).objective == uk.ppo((0.2, 0.3)).objective == Clip(0.2, 0.3)
    with pytest.raises(ValueError, match=r"clip must be a number or \(below, above\), got \(1, 2, 3\)"):
        uk.grpo(clip=(1, 2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uk.ppo("a"), r"low must be a number, got 'a' \(str\)"),
        (lambda: uk.ppo((0.2, None)), r"high must be a number, got None \(NoneType\)"),
        (lambda: uk.ppo(torch.ones(2)), r"low must be a number, got a tensor of shape \(2,\)"),
        (lambda: uk.grpo(beta="a"), r"beta must be a number, got 'a' \(str\)"),
        (lambda: uk.dpo("a"), r"beta must be a number, got 'a' \(str\)"),
        (lambda: uk.TokenMean("a"), r"count must be a number, got 'a' \(str\)"),
        (lambda: uk.FixedLength(None), r"n must be a number, got None \(NoneType\)"),
        (lambda: uk.Loss(3), r"objective must be callable, got 3 \(int\)"),
        (lambda: uk.Loss(Clip), r"objective must be made first, as in Clip\(\), got the class"),
        (
            lambda: uk.Loss(uk.grpo),
            r"got the recipe grpo \(.*, which makes a loss itself",
        ),
        (lambda: uk.Loss(Clip(), None), r"aggregation must have a method weights\(batch\).* got None"),
        (lambda: uk.Loss(Clip(), "mean"), r"aggregation must have a method weights\(batch\).* got 'mean'"),
        (lambda: uk.Loss(Clip(), uk.TokenMean), r"aggregation must have a method weights\(batch\).* got <class"),
    ],
)
def test_things_of_the_wrong_kind_fail_when_made(make: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("compiled", [False, True])
def test_sequences_that_end_beyond_the_batch_do_not_lead_there(compiled: bool) -> None:
    """``cu_seqlens`` may be wrong after the batch was checked: compiled code does not check, and values may change."""
    ends, reference = torch.tensor([0, 3, 6], dtype=torch.int32), torch.zeros(6)
    target = torch.zeros(6, dtype=torch.int64)

    def loss(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return uk.fused_loss(x, uk.Batch(target, ref_logp=reference, cu_seqlens=cu_seqlens), uk.dpo()).loss

    x = torch.randn(6, V)
    expected = loss(x, ends)
    if compiled:
        wrong = torch.tensor([0, 3, 10**6], dtype=torch.int32)
        got = torch.compile(loss, backend="eager")(x, wrong)
    else:
        batch = uk.Batch(target, ref_logp=reference, cu_seqlens=ends)
        ends[2] = 10**6
        got = uk.fused_loss(x, batch, uk.dpo()).loss
    torch.testing.assert_close(got, expected)


def test_what_overwritten_logits_are_a_view_of_cannot_be_read_either() -> None:
    leaf = logits(2, 4, V)
    whole = leaf * 1
    part = whole[:, :-1]
    expected = uk.fused_loss((leaf * 1)[:, :-1], BATCH, uk.grpo(beta=0.0)).loss
    out = uk.fused_loss(part, BATCH, uk.grpo(beta=0.0), plan=OVERWRITING)
    assert whole.numel() == part.numel() == 0
    with pytest.raises(IndexError):
        whole[0, 0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaf), torch.autograd.grad(expected, leaf), rtol=0, atol=0)


def test_view_of_a_leaf_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match="got a leaf that requires a gradient, or a view of one"):
        uk.fused_loss(logits(2, 4, V)[:, :-1], BATCH, uk.sft(), plan=OVERWRITING)


@pytest.mark.parametrize("view", ["unfolded", "expanded", "crossed"])
def test_rows_that_overlap_are_not_overwritten(view: str) -> None:
    memory = torch.randn(64, requires_grad=True) * 1
    x = {
        "unfolded": lambda: memory.unfold(0, V, 1)[:6].view(2, 3, V),
        "expanded": lambda: memory[:V].expand(2, 3, V),
        "crossed": lambda: memory.as_strided((2, 3, V), (V, 2 * V - 1, 1)),
    }[view]()
    with pytest.raises(ValueError, match="needs rows that do not overlap, got strides"):
        uk.fused_loss(x, BATCH, uk.sft(), plan=OVERWRITING)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_fp16_gradients_are_rounded_after_the_loss_scale(backend: str) -> None:
    """Without the loss scale, gradients of single tokens of a large batch would round to 0 in fp16."""
    tokens, vocab, scale = 512, 4000, 2.0**16
    x, target = torch.randn(tokens, vocab).half(), torch.randint(0, vocab, (tokens,))
    batch = uk.Batch(target, cu_seqlens=torch.tensor([0, tokens]))
    for overwrite in (False, True):
        leaf = x.clone().requires_grad_()
        plan = uk.Plan(backend, overwrite_logits=overwrite)
        (uk.fused_loss(leaf * 1, batch, uk.sft(), plan=plan).loss * scale).backward()
        truth = x.double().requires_grad_()
        (torch.nn.functional.cross_entropy(truth, target) * scale).backward()
        error = (leaf.grad - truth.grad).norm() / truth.grad.norm()
        assert error < 2**-11, "half of an ulp of fp16"


def test_parameters_of_an_objective_are_not_forgotten() -> None:
    class Learned:
        scope = "sequence"

        def __init__(self) -> None:
            self.a = torch.nn.Parameter(torch.tensor(2.0))

        def __call__(self, t: Any) -> Tensor:
            return -self.a * t.to_tokens(t.sequence_mean(t.logp))

    objective = Learned()
    with pytest.raises(ValueError, match=r"must not depend on tensors that require a gradient.*got one of shape \(\)"):
        uk.fused_linear_loss(logits(2, 3, 4), logits(V, 4), BATCH, uk.Loss(objective))
    uk.fused_loss(logits(), BATCH, uk.Loss(objective)).loss.backward()
    assert objective.a.grad is not None
