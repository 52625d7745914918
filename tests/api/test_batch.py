"""Bad input raises an error that names the argument, the expected value and the actual one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import unirl_kernels as uk
from tests.runners import Runner

T = torch.zeros(4, 128, dtype=torch.int64)
PACKED = torch.zeros(10, dtype=torch.int64)
ENDS = torch.tensor([0, 4, 10], dtype=torch.int32)
LOGITS = torch.zeros(4, 128, 5)

BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "old_logp's length": (
        lambda: uk.Batch(T, old_logp=torch.zeros(4, 127)),
        ValueError,
        r"old_logp must have shape \(4, 128\), got \(4, 127\)",
    ),
    "ref_logp's rank": (
        lambda: uk.Batch(T, ref_logp=torch.zeros(4)),
        ValueError,
        r"ref_logp must have shape \(4, 128\), got \(4,\)",
    ),
    "advantage's shape": (
        lambda: uk.Batch(T, advantage=torch.zeros(5)),
        ValueError,
        r"advantage must have shape \(4,\) or \(4, 128\), got \(5,\)",
    ),
    "advantage's dtype": (
        lambda: uk.Batch(T, advantage=torch.zeros(4, dtype=torch.complex64)),
        TypeError,
        "advantage must be real, integer or bool, got complex64",
    ),
    "fields that are no mapping": (
        lambda: uk.Batch(T, fields=[torch.ones(4)]),
        TypeError,
        "fields must map names to tensors, got list",
    ),
    "a field's shape": (
        lambda: uk.Batch(T, fields={"reward": torch.ones(5)}),
        ValueError,
        r"fields\['reward'\] must have shape \(\) or \(4,\) or \(4, 128\), got \(5,\)",
    ),
    "a field that is no tensor": (
        lambda: uk.Batch(T, fields={"reward": 1.0}),
        TypeError,
        r"fields\['reward'\] must be a tensor, got float",
    ),
    "a field's name": (
        lambda: uk.Batch(T, fields={"my reward": torch.ones(4)}),
        ValueError,
        "identifiers and do not start with _, got 'my reward'",
    ),
    "a name that is an argument": (
        lambda: uk.Batch(T, fields={"old_logp": torch.ones(4, 128)}),
        ValueError,
        "name that is taken, got 'old_logp', an argument of Batch",
    ),
    "a name that tokens have": (
        lambda: uk.Batch(T, fields={"lengths": torch.ones(4)}),
        ValueError,
        "name that is taken, got 'lengths', an attribute of the tokens",
    ),
    "pairs": (
        lambda: uk.Batch(T, pairs="neighbours"),
        ValueError,
        "pairs must be 'halves' or 'interleaved', got 'neighbours'",
    ),
    "values per token or per sequence": (
        lambda: uk.Batch(
            torch.tensor([1, 2]), advantage=torch.ones(2), cu_seqlens=torch.tensor([0, 2, 2], dtype=torch.int32)
        ),
        ValueError,
        "advantage is ambiguous: target has 2 tokens in as many sequences, some of them empty",
    ),
    "the name of a field that is not given": (
        lambda: uk.Batch(T, fields={"reward": torch.ones(4)}, sequence_fields=["advantage"]),
        ValueError,
        r"sequence_fields must name fields of this batch, \['reward'\], got 'advantage'",
    ),
    "a log-probability per sequence": (
        lambda: uk.Batch(T, old_logp=torch.zeros(4, 128), sequence_fields=["old_logp"]),
        ValueError,
        r"sequence_fields must name fields of this batch, \[\], got 'old_logp'",
    ),
    "names that are a string": (
        lambda: uk.Batch(T, advantage=torch.ones(4), sequence_fields="advantage"),
        TypeError,
        "sequence_fields must be a collection of names, got the string 'advantage'",
    ),
    "names that can be read once": (
        lambda: uk.Batch(T, advantage=torch.ones(4), sequence_fields=iter(["advantage"])),
        TypeError,
        "sequence_fields must be a collection of names, got list_iterator",
    ),
    "a sparse target": (lambda: uk.Batch(T.to_sparse()), TypeError, "target must be a dense tensor, got layout"),
    "a sparse field": (
        lambda: uk.Batch(T, fields={"x": torch.ones(4, 128).to_sparse()}),
        TypeError,
        r"fields\['x'\] must be a dense tensor, got layout torch.sparse_coo",
    ),
    "a field of 8 bits": (
        lambda: uk.Batch(T, fields={"x": torch.ones(4, 128).to(torch.float8_e5m2)}),
        TypeError,
        r"fields\['x'\] must be real, integer or bool, of at least 16 bits if floating-point, got float8_e5m2",
    ),
    "a mask that is a list": (lambda: uk.shift_targets(T, [1]), TypeError, "mask must be a tensor, got list"),
    "bytes that are a bool": (
        lambda: uk.Plan(max_chunk_bytes=True),
        TypeError,
        "max_chunk_bytes must be an int, got True",
    ),
    "a value per token of a field of sequences": (
        lambda: uk.Batch(T, advantage=torch.ones(4, 128), sequence_fields=["advantage"]),
        ValueError,
        r"advantage must have shape \(4,\), got \(4, 128\)",
    ),
    "a value per sequence of a field of tokens": (
        lambda: uk.Batch(T, advantage=torch.ones(4), sequence_fields=[]),
        ValueError,
        r"advantage must have shape \(4, 128\), got \(4,\)",
    ),
    "temperatures per token or per sequence": (
        lambda: uk.fused_loss(
            torch.zeros(2, 5),
            uk.Batch(torch.tensor([1, 2]), cu_seqlens=torch.tensor([0, 2, 2])),
            uk.sft(),
            readout=uk.Readout(temperature=torch.tensor([1.0, 2.0])),
        ),
        ValueError,
        r"temperature must be a number where target has 2 tokens in as many sequences, .* got shape \(2,\)",
    ),
    "differentiable old_logp": (
        lambda: uk.Batch(T, old_logp=torch.zeros(4, 128, requires_grad=True)),
        ValueError,
        "old_logp must not require a gradient",
    ),
    "target's dtype": (lambda: uk.Batch(T.int()), TypeError, "target must be int64, got int32"),
    "target's type": (lambda: uk.Batch([1, 2]), TypeError, "target must be a tensor of int64, got list"),
    "target's rank": (lambda: uk.Batch(T[None]), ValueError, r"target must have shape \[B, L\] or \[T\], got \(1, 4"),
    "packed without cu_seqlens": (lambda: uk.Batch(PACKED), ValueError, "cu_seqlens must be given"),
    "padded with cu_seqlens": (lambda: uk.Batch(T, cu_seqlens=ENDS), ValueError, "cu_seqlens is for packed targets"),
    "cu_seqlens of another length": (
        lambda: uk.Batch(PACKED, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32)),
        ValueError,
        r"cu_seqlens must rise from 0 to 10 .* got \[0, 4, 9\]",
    ),
    "cu_seqlens that fall": (
        lambda: uk.Batch(PACKED, cu_seqlens=torch.tensor([0, 6, 4, 10], dtype=torch.int32)),
        ValueError,
        "cu_seqlens must rise",
    ),
    "cu_seqlens of floats": (
        lambda: uk.Batch(PACKED, cu_seqlens=ENDS.float()),
        TypeError,
        "cu_seqlens must be int32 or int64, got float32",
    ),
    "cu_seqlens too short": (
        lambda: uk.Batch(PACKED, cu_seqlens=ENDS[:1]),
        ValueError,
        r"cu_seqlens must have shape \[S \+ 1\], S >= 1, got \(1,\)",
    ),
    "logits of other tokens": (
        lambda: uk.token_stats(LOGITS[:, 1:], T),
        ValueError,
        r"logits must have shape \(4, 128, V\), got \(4, 127, 5\)",
    ),
    "integer logits": (lambda: uk.token_stats(LOGITS.long(), T), TypeError, "logits must be one of .* got int64"),
    "transposed logits": (
        lambda: uk.token_stats(torch.zeros(4, 5, 128).transpose(1, 2), T),
        ValueError,
        "logits must be contiguous in the last dimension",
    ),
    "no columns": (lambda: uk.token_stats(LOGITS[..., :0], T), ValueError, "logits must have at least one column"),
    "temperatures of other tokens": (
        lambda: uk.token_stats(LOGITS, T, readout=uk.Readout(temperature=torch.ones(5))),
        ValueError,
        r"temperature must have shape \(4, 128\) or one value per sequence, got \(5,\)",
    ),
    "unknown backend": (
        lambda: uk.token_stats(LOGITS, T, plan=uk.Plan(backend="gpu")),
        ValueError,
        "backend must be one of cpu, triton, cuda, eager, got 'gpu'",
    ),
    "unknown kernel": (
        lambda: uk.token_stats(LOGITS, T, plan=uk.Plan(backend="eager", kernel="fast")),
        ValueError,
        "kernel of backend 'eager' must be one of rows, composed, got 'fast'",
    ),
    "one-pass kernel for pairs": (
        lambda: uk.fused_loss(LOGITS, uk.Batch(T), uk.dpo(), plan=uk.Plan(backend="eager", kernel="rows")),
        ValueError,
        "kernel must be 'composed' for a pair-scope objective, got 'rows'",
    ),
    "half a pair": (
        lambda: uk.fused_loss(LOGITS[:3], uk.Batch(T[:3], ref_logp=torch.zeros(3, 128)), uk.dpo()),
        ValueError,
        "target must hold an even number of sequences",
    ),
    "leaf to overwrite": (
        lambda: uk.fused_loss(
            LOGITS.clone().requires_grad_(), uk.Batch(T), uk.sft(), plan=uk.Plan(overwrite_logits=True)
        ),
        ValueError,
        "overwrite_logits=True needs logits that were computed",
    ),
    "group size": (
        lambda: uk.group_advantages(torch.ones(6), 4),
        ValueError,
        "group_size must be at least 2 and divide the 6 rewards, got 4",
    ),
    "rewards of integers": (
        lambda: uk.group_advantages(torch.ones(6, dtype=torch.int64), 3),
        TypeError,
        "rewards must be a floating-point tensor",
    ),
    "mask's shape": (
        lambda: uk.shift_targets(T, torch.ones(4, 127)),
        ValueError,
        r"mask must have shape \(4, 128\), got \(4, 127\)",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "_"))
def test_bad_input(case: str) -> None:
    act, error, message = BAD[case]
    with pytest.raises(error, match=message):
        act()


@pytest.mark.parametrize("bad", [5, -1, -101, 2**40])
def test_target_outside_the_vocabulary(bad: int, runner: Runner) -> None:
    """IndexError on the CPU; on an accelerator NaN in that row's loss and gradient, never out of bounds."""
    target = torch.tensor([1, bad, 2], device=runner.device)
    leaf = torch.randn(3, 5, device=runner.device).requires_grad_()
    batch = uk.Batch(target, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32, device=runner.device))
    if runner.device == "cpu":
        with pytest.raises(IndexError, match=rf"target must lie in \[0, 5\) or be -100, got {bad} at \(1,\)"):
            uk.fused_loss(leaf, batch, uk.sft(), plan=runner.plan())
        return
    out = uk.fused_loss(leaf, batch, uk.sft(), plan=runner.plan())
    (d_logits,) = torch.autograd.grad(out.loss, leaf)
    assert torch.isnan(out.loss)
    assert torch.isnan(d_logits[1]).all()
    assert torch.isfinite(d_logits[[0, 2]]).all()


def test_shift_targets() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    i = uk.IGNORE
    assert uk.shift_targets(ids).tolist() == [[6, 7, 8, i], [4, 3, 2, i]]
    assert uk.shift_targets(ids, mask).tolist() == [[i, 7, 8, i], [4, 3, i, i]]


def test_shifted_targets_spare_the_slice(runner: Runner) -> None:
    """The loss of unsliced logits is the loss of logits[:, :-1] against ids[:, 1:]; the last one gets none."""
    ids = torch.randint(0, 31, (2, 6), device=runner.device)
    leaf = torch.randn(2, 6, 31, device=runner.device).requires_grad_()
    whole = uk.fused_loss(leaf, uk.Batch(uk.shift_targets(ids)), uk.sft(), plan=runner.plan())
    sliced = uk.fused_loss(leaf[:, :-1], uk.Batch(ids[:, 1:].contiguous()), uk.sft(), plan=runner.plan())
    torch.testing.assert_close(whole.loss, sliced.loss)
    gradients = [torch.autograd.grad(out.loss, leaf)[0] for out in (whole, sliced)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][:, -1].any()


def test_group_advantages() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    advantages = uk.group_advantages(rewards, 4)
    std = rewards[:4].std()
    torch.testing.assert_close(advantages[:4], (rewards[:4] - 0.5) / (std + 1e-4))
    assert not advantages[4:].any(), "a group of equal rewards teaches nothing"


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        (uk.SequenceMean(), [1 / 9, 1 / 9, 1 / 9, 1 / 3]),
        (uk.TokenMean(), [1 / 4] * 4),
        (uk.TokenMean(8), [1 / 8] * 4),
        (uk.TokenMean(torch.tensor(8)), [1 / 8] * 4),
        (uk.FixedLength(5), [1 / 15] * 4),
    ],
    ids=str,
)
def test_weights_of_three_tokens_none_and_one(aggregation: object, expected: list[float]) -> None:
    i = uk.IGNORE
    padded = uk.Batch(torch.tensor([[1, 1, 1], [i, i, i], [i, 1, i]]))
    ends = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    packed = uk.Batch(torch.tensor([1, 1, 1, i, i, 1]), cu_seqlens=ends)
    for batch in (padded, packed):
        weights = aggregation.weights(batch)
        assert weights.shape == batch.target.shape
        torch.testing.assert_close(weights[batch.valid], torch.tensor(expected, dtype=torch.float64))
        assert not weights[~batch.valid].any()


def test_a_mapping_that_changes_later_does_not_change_the_batch() -> None:
    """A loop over micro-batches may use one mapping."""
    fields: dict[str, torch.Tensor] = {}
    batches = []
    for k in (1.0, 2.0):
        fields["w"] = torch.full((4,), k)
        batches.append(uk.Batch(T, fields=fields))
    assert [batch.get("w")[0].item() for batch in batches] == [1.0, 2.0]


@pytest.mark.parametrize("names", [None, [], ["advantage"]])
def test_a_temperature_where_each_sequence_has_one_token(names: list[str] | None) -> None:
    batch = uk.Batch(torch.tensor([1, 2]), torch.ones(2), cu_seqlens=torch.arange(3), sequence_fields=names)
    logits, temperature = torch.randn(2, 5), torch.tensor([0.5, 2.0])
    got = uk.fused_loss(logits, batch, uk.rft(), readout=uk.Readout(temperature=temperature)).logp
    torch.testing.assert_close(got, torch.log_softmax(logits / temperature[:, None], -1)[[0, 1], [1, 2]])


def test_sequence_fields_may_be_any_collection() -> None:
    names = {"advantage": None, "x": None}
    batch = uk.Batch(T, torch.ones(4), fields={"x": torch.ones(4)}, sequence_fields=names.keys())
    assert batch.sequence_fields == frozenset(names)
    assert replace(batch, advantage=torch.zeros(4)).sequence_fields == {*names}
