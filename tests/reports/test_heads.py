"""The weight of a linear head: tied, frozen, adapted, sharded, in chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import unirl_kernels as uk
from tests.reports.calls import close, exact, head_of, packed
from unirl_kernels.backends import load


def chunks_of(tokens: int, weight: Tensor, dtype: torch.dtype) -> uk.Plan:
    return uk.Plan("cpu", max_chunk_bytes=tokens * load("cpu").matmuls(weight, dtype).row_bytes)


def d_logits_of(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Of the mean of -log p, in fp64."""
    logits = hidden.double() @ weight.double().t()
    return -exact(logits, target)[2] / len(target)


def test_a_gradient_for_each_token_reaches_the_weight() -> None:
    """The weight's gradient was summed over tokens before their upstream gradients were known:
    https://github.com/linkedin/Liger-Kernel/issues/968, https://github.com/linkedin/Liger-Kernel/pull/1298
    """
    hidden, weight, target = head_of()
    leaf, w = hidden.requires_grad_(), weight.requires_grad_()
    upstream = torch.tensor([1.0, -2, 0, 0.5, 3, 0])
    stats = uk.linear_token_stats(leaf, w, target)
    d_hidden, d_weight = torch.autograd.grad(stats.logp, (leaf, w), upstream)
    slope = exact(hidden @ weight.t(), target)[2] * upstream.unsqueeze(-1)
    close(d_hidden, slope @ weight.double(), size=8)
    close(d_weight, slope.t() @ hidden.double(), size=8)


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_the_weight_gradient_is_not_summed_in_bf16(tokens: int) -> None:
    """Sums over chunks in the weight's dtype drift off: https://github.com/linkedin/Liger-Kernel/issues/512,
    https://github.com/linkedin/Liger-Kernel/issues/827, https://github.com/axolotl-ai-cloud/axolotl/pull/1601
    """
    hidden, weight, target = head_of(64, 9, 8, torch.bfloat16)
    hidden = hidden.abs()  # so that sums grow, and lose what is added late
    w = weight.requires_grad_()
    loss = uk.Loss(uk.sft().objective, uk.TokenMean())
    out = uk.fused_linear_loss(hidden, w, packed(target), loss, plan=chunks_of(tokens, weight, torch.bfloat16))
    (found,) = torch.autograd.grad(out.loss, w)
    d_logits = d_logits_of(hidden, weight, target)
    expected = d_logits.t() @ hidden.double()
    # Each logit's gradient is rounded once where the matmul takes bf16, and the sum once.
    allowed = 2**-9 * (d_logits.abs().t() @ hidden.double()) + 2**-8 * expected.abs()
    assert ((found.double() - expected).abs() <= allowed).all()


def test_a_bias() -> None:
    """With a bias losses were far too low, even negative: https://github.com/apple/ml-cross-entropy/issues/52"""
    hidden, weight, target = head_of()
    bias = torch.randn(len(weight)).requires_grad_()
    logits = hidden.double() @ weight.double().t() + bias.double()
    out = uk.fused_linear_loss(hidden, weight, packed(target), uk.sft(), bias=bias)
    (d_bias,) = torch.autograd.grad(out.loss, bias)
    logp, _, slope = exact(logits, target)
    close(out.loss, -logp.mean(), size=4)
    close(d_bias, -slope.mean(0))


def test_a_tied_weight_gets_both_gradients() -> None:
    """Embedding and head drifted apart, or one of them got no gradient: https://github.com/unslothai/unsloth/pull/3711,
    https://github.com/huggingface/peft/issues/2864
    """
    torch.manual_seed(0)
    table = nn.Embedding(17, 8)
    ids = torch.randint(0, 17, (1, 6))
    target = uk.shift_targets(ids)
    found = []
    for fused in (True, False):
        table.zero_grad()
        hidden = torch.tanh(table(ids))
        if fused:
            uk.fused_linear_loss(hidden, table.weight, uk.Batch(target), uk.sft()).loss.backward()
        else:
            logits = (hidden @ table.weight.t())[0, :-1]
            torch.nn.functional.cross_entropy(logits, target[0, :-1]).backward()
        found.append(table.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_part_costs_and_gets_nothing(frozen: str) -> None:
    """Frozen heads and inputs met code that scales gradients which are not there:
    https://github.com/Dao-AILab/quack/pull/209
    """
    hidden, weight, target = head_of()
    operands = {"hidden": hidden, "weight": weight}
    for name, x in operands.items():
        x.requires_grad_(name != frozen)
    (3 * uk.fused_linear_loss(hidden, weight, packed(target), uk.sft()).loss).backward()
    d_logits = 3 * d_logits_of(hidden.detach(), weight.detach(), target)
    assert operands[frozen].grad is None
    if frozen == "weight":
        close(hidden.grad, d_logits @ weight.double(), size=8)
    else:
        close(weight.grad, d_logits.t() @ hidden.double(), size=8)


def test_a_head_adapted_with_lora() -> None:
    """The weight that is read by attribute is the frozen one below the adapter:
    https://github.com/huggingface/trl/issues/4612, https://github.com/huggingface/trl/pull/5977
    """
    peft = pytest.importorskip("peft")
    layer = nn.Linear(8, 17, bias=False)
    adapted = peft.tuners.lora.Linear(layer, "default", config=peft.LoraConfig(r=2, init_lora_weights=False), r=2)
    hidden, _, target = head_of()
    weight, bias = uk.head_parameters(adapted)
    out = uk.fused_linear_loss(hidden, weight, packed(target), uk.sft(), bias=bias)
    out.loss.backward()
    close(out.loss, -exact(adapted(hidden), target)[0].mean(), size=8)
    for adapter in (adapted.lora_A["default"], adapted.lora_B["default"]):
        assert adapter.weight.grad.abs().sum() > 0


def test_a_weight_that_is_partitioned() -> None:
    """ZeRO-3 leaves an empty tensor in place of the weight, FSDP a flat or a freed one:
    https://github.com/huggingface/trl/issues/3368, https://github.com/linkedin/Liger-Kernel/issues/332,
    https://github.com/huggingface/trl/pull/6372
    """
    hidden, weight, target = head_of()
    empty = nn.Parameter(torch.empty(0))
    empty.ds_id = 0
    with pytest.raises(ValueError, match="weight must be a whole tensor, got one that ZeRO-3 has partitioned"):
        uk.fused_linear_loss(hidden, empty, packed(target), uk.sft())
    with pytest.raises(ValueError, match=r"weight must have shape \(V, 8\)"):
        uk.fused_linear_loss(hidden, weight.flatten(), packed(target), uk.sft())
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight must have memory"):
        uk.fused_linear_loss(hidden, weight, packed(target), uk.sft())


@pytest.mark.parametrize("tokens", [1, 2, 5, 6])
def test_only_the_last_tokens_count(tokens: int) -> None:
    """Where the first chunks had nothing to learn from, all gradients were 0 beside a loss that looked right:
    https://github.com/unslothai/unsloth/issues/5230
    """
    hidden, weight, target = head_of(11)
    target[:5] = uk.IGNORE
    hidden.requires_grad_(), weight.requires_grad_()
    plan = chunks_of(tokens, weight, torch.float32)
    out = uk.fused_linear_loss(hidden, weight, packed(target), uk.sft(), plan=plan)
    d_hidden, d_weight = torch.autograd.grad(out.loss, (hidden, weight))
    d_logits = d_logits_of(hidden.detach()[5:], weight.detach(), target[5:])
    close(d_hidden[5:], d_logits @ weight.double(), size=8)
    close(d_weight, d_logits.t() @ hidden[5:].double(), size=8)
    assert not d_hidden[:5].any()


def test_autocast_and_a_weight_in_fp32() -> None:
    """Chunks of another dtype than the weight's under autocast: https://github.com/linkedin/Liger-Kernel/pull/307.
    Logits stay in fp32.
    """
    hidden, weight, target = head_of()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = uk.fused_linear_loss(hidden, weight, packed(target), uk.sft())
    out.loss.backward()
    rounded = hidden.bfloat16().double() @ weight.detach().bfloat16().double().t()
    close(out.loss, -exact(rounded, target)[0].mean(), size=8)
    assert weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert uk.token_stats(rounded.float(), target).logp.dtype == torch.float32


def test_a_vocabulary_padded_with_rows_of_the_weight() -> None:
    """A padded column can be taken for the target's, or gain probability: https://github.com/apple/ml-cross-entropy/pull/59.
    A bias of -inf takes it out.
    """
    hidden, weight, target = head_of()
    padded = torch.cat([weight, torch.randn(3, 8)]).requires_grad_()
    bias = torch.zeros(20).index_fill_(0, torch.tensor([17, 18, 19]), -math.inf)
    out = uk.fused_linear_loss(hidden, padded, packed(target), uk.sft(), bias=bias)
    (d_weight,) = torch.autograd.grad(out.loss, padded)
    close(out.loss, -exact(hidden @ weight.t(), target)[0].mean(), size=8)
    assert not d_weight[17:].any()


def test_hidden_states_are_no_logits() -> None:
    """Hidden states passed for logits, and the other way round: https://github.com/unslothai/unsloth-zoo/issues/708"""
    hidden, weight, target = head_of()
    with pytest.raises(ValueError, match=r"weight must have shape \(V, 17\)"):
        uk.fused_linear_loss(hidden @ weight.t(), weight, packed(target), uk.sft())
    with pytest.raises(IndexError, match=r"target must lie in \[0, 8\)"):
        uk.fused_loss(hidden, packed(target.fill_(16)), uk.sft())
