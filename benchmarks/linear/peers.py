"""What people would use instead of this package's linear heads. A row that cannot take part says why.

Versions looked at: PyTorch 2.13.0, TRL 1.16.0, Liger-Kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels 0.6.5,
flash-linear-attention 0.6.0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import Inputs, Values
from benchmarks.logits.peers import TRL, import_compiler, import_trl, log_softmax
from benchmarks.providers import Bind, Function, Provider, Skipped, needs, needs_gpu, needs_loss
from benchmarks.work import FUSED


def _needs_16_bits(inputs: Inputs) -> None:
    if inputs.work.dtype == "fp32":
        raise Skipped("another row says it: the operands are fp32")


def whole_logits(inputs: Inputs) -> Function:
    """Logits as a whole, in the operands' dtype; the rest in fp32."""
    _needs_16_bits(inputs)
    of_logits = log_softmax(inputs)
    return lambda hidden, weight: of_logits(F.linear(hidden, weight).float())


def whole_logits_in_fp32(inputs: Inputs) -> Function:
    of_logits = log_softmax(inputs)
    return lambda hidden, weight: of_logits(F.linear(hidden.float(), weight.float()))


def compiled(bind: Bind) -> Bind:
    def bind_compiled(inputs: Inputs) -> Function:
        function = bind(inputs)
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True)

    return bind_compiled


def torch_linear_cross_entropy(chunked: bool) -> Bind:
    def bind(inputs: Inputs) -> Function:
        needs_loss(inputs.work, "sft")
        if not hasattr(F, "linear_cross_entropy"):
            raise Skipped("needs torch 2.13")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        target = inputs.batch.target.flatten()

        def loss(hidden: Tensor, weight: Tensor) -> Values:
            return Values(F.linear_cross_entropy(hidden.flatten(0, 1), weight, target, options=options))

        return loss

    return bind


def liger_cross_entropy(chunk_mem_const: int) -> Bind:
    """Chunks of ``chunk_mem_const`` times the memory of the hidden states; 1 is its default."""

    def bind(inputs: Inputs) -> Function:
        needs_loss(inputs.work, "sft")
        needs_gpu(inputs.work)
        functional = needs("liger_kernel.transformers.functional", "liger-kernel")
        loss, target = functional.liger_fused_linear_cross_entropy, inputs.batch.target.flatten()

        def value(hidden: Tensor, weight: Tensor) -> Values:
            return Values(loss(hidden.flatten(0, 1), weight, target, chunk_mem_const=chunk_mem_const))

        return value

    return bind


def quack(inputs: Inputs) -> Function:
    """With its scaled exponentials if it supports the shape, else with its plain chunks."""
    needs_loss(inputs.work, "sft")
    needs_gpu(inputs.work)
    _needs_16_bits(inputs)
    loss = needs("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
    target = inputs.batch.target.flatten()
    return lambda hidden, weight: Values(loss(hidden.flatten(0, 1), weight, target))


def fla(inputs: Inputs) -> Function:
    needs_loss(inputs.work, "sft")
    needs_gpu(inputs.work)
    modules = needs("fla.modules.fused_linear_cross_entropy", "flash-linear-attention")
    loss, target = modules.fused_linear_cross_entropy_loss, inputs.batch.target.flatten()
    return lambda hidden, weight: Values(loss(hidden.flatten(0, 1), target, weight))


def liger_grpo(inputs: Inputs) -> Function:
    """Ignored tokens are masked. ``loss_type`` "grpo" is the mean over sequences of their means."""
    work, batch = inputs.work, inputs.batch
    needs_loss(work, "grpo", "ppo")
    chunked = needs("liger_kernel.chunked_loss", "liger-kernel")
    beta = 0.04 if work.loss == "grpo" else 0.0
    numbers = {"beta": beta, "epsilon_low": 0.2, "epsilon_high": 0.2, "use_ref_model": bool(beta)}
    grpo = chunked.LigerFusedLinearGRPOLoss(**numbers, loss_type="grpo")
    policies = {"ref_per_token_logps": batch.ref_logp if beta else None, "old_per_token_logps": batch.old_logp}
    ids, mask, advantage = inputs.index, inputs.used.float(), batch.advantage

    def loss(hidden: Tensor, weight: Tensor) -> Values:
        return Values(grpo(hidden, weight, ids, mask, advantage, **policies)[0])

    return loss


def trl(inputs: Inputs) -> Function:
    """As ``add_fused_lm_head`` calls it: the positions that count on a GPU, all positions elsewhere."""
    utils = needs(TRL, "trl")
    chunked, used, fused = utils._ChunkedLogProbFunction, inputs.used, inputs.work.mode == FUSED
    compact = torch.device(inputs.work.device).type == "cuda"
    targets = inputs.batch.target[used] if compact else inputs.index.flatten()
    how: tuple[Any, ...] = (1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, () if fused else ("entropy",))

    def whole(x: Tensor) -> Tensor:
        return x.new_zeros(used.shape).masked_scatter(used, x) if compact else x.view(used.shape).masked_fill(~used, 0)

    def both(hidden: Tensor, weight: Tensor) -> Values:
        rows = hidden[used] if compact else hidden.flatten(0, 1)
        logp, entropy, *_ = chunked.apply(rows, weight, None, targets, *how)
        return inputs.composed(whole(logp)) if fused else Values(None, whole(logp), whole(entropy))

    return both


def trl_in_fp32(inputs: Inputs) -> Function:
    """With ``cast_lm_head_to_fp32``: the weight follows, a tile at a time."""
    _needs_16_bits(inputs)
    function = trl(inputs)
    return lambda hidden, weight: function(hidden.float(), weight)


def cut_cross_entropy(inputs: Inputs) -> Function:
    """Its kernel needs a GPU; elsewhere the package offers plain PyTorch, compiled."""
    needs_loss(inputs.work, "sft")
    function = needs("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    implementation = "cce" if torch.device(inputs.work.device).type == "cuda" else "torch_compile"
    target = inputs.batch.target
    return lambda hidden, weight: Values(function(hidden, weight, target, impl=implementation))


PEERS = [
    Provider("eager", "F.linear in fp32", whole_logits_in_fp32),
    Provider("eager", "F.linear", whole_logits),
    Provider("compile", "F.linear in fp32", compiled(whole_logits_in_fp32), prepare=import_compiler),
    Provider("compile", "F.linear", compiled(whole_logits), prepare=import_compiler),
    Provider("torch", "F.linear_cross_entropy", torch_linear_cross_entropy(chunked=False)),
    Provider("torch", "F.linear_cross_entropy, chunked", torch_linear_cross_entropy(chunked=True)),
    Provider("trl", "_ChunkedLogProbFunction", trl, prepare=import_trl),
    Provider("trl", "_ChunkedLogProbFunction in fp32", trl_in_fp32, prepare=import_trl),
    Provider("liger", "fused_linear_cross_entropy", liger_cross_entropy(1)),
    Provider("liger", "fused_linear_cross_entropy, larger chunks", liger_cross_entropy(16)),
    Provider("liger", "LigerFusedLinearGRPOLoss", liger_grpo),
    Provider("quack", "chunked_linear_cross_entropy", quack),
    Provider("fla", "fused_linear_cross_entropy_loss", fla),
    Provider("cce", "linear_cross_entropy", cut_cross_entropy),
]
