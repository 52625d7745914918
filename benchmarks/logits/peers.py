"""What people would use instead. One row per kernel in ``PEERS``; a row that cannot take part says why.

Versions looked at: TRL 1.16.0, Liger-Kernel 0.8.5, flash-linear-attention 0.6.0, flash-attn 2.8.4, quack-kernels
0.6.5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.imports import imported
from benchmarks.inputs import Inputs, Values
from benchmarks.providers import Bind, Function, Provider, Skipped, needs, needs_gpu, needs_loss
from benchmarks.work import FUSED, STATS

Statistics = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From logits, [B, L, V], to log-probability and, where there is one, entropy, [B, L], differentiable."""

TRL = "trl.trainer.utils"


def import_trl(device: torch.device) -> None:
    imported(TRL)


def import_compiler(device: torch.device) -> None:
    """Import torch.compile's modules, and compile nothing: a copied process would wait for threads that it lacks."""
    imported("torch._inductor.compile_fx")
    cpp = imported("torch._inductor.config").cpp
    if device.type == "cpu" and cpp.vec_isa_ok is None:
        # Else it tries the compiler for each of the processor's instruction sets, which takes longer than compiling.
        cpp.vec_isa_ok = True


def _either(inputs: Inputs, with_entropy: Statistics, without: Callable[[Tensor], Tensor]) -> Function:
    """The function for the mode. The entropy is computed only for statistics, since no loss here uses it."""
    if inputs.work.mode == FUSED:
        return lambda logits: inputs.composed(without(logits))
    return lambda logits: Values(None, *with_entropy(logits))


def _in_fp32(bind: Bind) -> Bind:
    """The peer on logits that were converted to fp32, as under autocast."""

    def bind_converted(inputs: Inputs) -> Function:
        function = bind(inputs)
        return lambda logits: function(logits.float())

    return bind_converted


def _unconverted(bind: Bind) -> Bind:
    def bind_unless_fp32(inputs: Inputs) -> Function:
        if inputs.work.dtype == "fp32":
            raise Skipped("the same as in fp32")
        return bind(inputs)

    return bind_unless_fp32


def log_softmax(inputs: Inputs) -> Function:
    index = inputs.index.unsqueeze(-1)

    def logp(logits: Tensor) -> Tensor:
        return torch.log_softmax(logits, -1).gather(-1, index).squeeze(-1)

    def logp_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
        everything = torch.log_softmax(logits, -1)
        return everything.gather(-1, index).squeeze(-1), -(everything.exp() * everything).sum(-1)

    return _either(inputs, logp_and_entropy, logp)


def compiled(inputs: Inputs) -> Function:
    torch.compiler.reset()
    return torch.compile(_in_fp32(log_softmax)(inputs), fullgraph=True)


def cross_entropy(inputs: Inputs) -> Function:
    needs_loss(inputs.work, "sft")
    target = inputs.batch.target.flatten()
    return lambda logits: Values(F.cross_entropy(logits.flatten(0, 1), target))


def trl(inputs: Inputs) -> Function:
    utils = needs(TRL, "trl")
    index, used = inputs.index, inputs.used

    def logp(logits: Tensor) -> Tensor:
        return utils.selective_log_softmax(logits, index, row_mask=used)

    return _either(inputs, lambda logits: (logp(logits), utils.entropy_from_logits(logits)), logp)


def trl_head(inputs: Inputs) -> Function:
    needs_gpu(inputs.work)
    kernels = needs("trl.kernels.logprob_entropy", "trl")
    index, used = inputs.index, inputs.used

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.selective_log_softmax_and_entropy(logits, index, row_mask=used)

    return _either(inputs, both, lambda logits: both(logits)[0])


def liger_cross_entropy(inputs: Inputs) -> Function:
    needs_loss(inputs.work, "sft")
    needs_gpu(inputs.work)
    loss = needs("liger_kernel.transformers", "liger-kernel").LigerCrossEntropyLoss()
    target = inputs.batch.target.flatten()
    return lambda logits: Values(loss(logits.flatten(0, 1), target))


def _needs_ignored_last(inputs: Inputs) -> None:
    if inputs.work.length < 2:
        raise Skipped("needs sequences of at least two positions, of which it ignores the last")


def liger_grpo(overwrites: bool) -> Bind:
    def bind(inputs: Inputs) -> Function:
        work, batch = inputs.work, inputs.batch
        needs_loss(work, "grpo", "ppo")
        needs_gpu(work)
        _needs_ignored_last(inputs)
        grpo = needs("liger_kernel.transformers.grpo_loss", "liger-kernel").triton_grpo_loss
        ids, old, ref = (
            None if x is None else x[:, :-1].contiguous() for x in (batch.target, batch.old_logp, batch.ref_logp)
        )
        beta = 0.04 if work.loss == "grpo" else 0.0
        numbers = {"temperature": 1.0, "beta": beta, "eps_low": 0.2, "eps_high": 0.2, "inplace": overwrites}
        how = {"loss_type": "grpo", "reduce": True}

        def loss(logits: Tensor) -> Values:
            return Values(grpo(logits, old, ref if beta else None, ids, batch.advantage, **numbers, **how)[0])

        return loss

    return bind


def liger_log_softmax(inputs: Inputs) -> Function:
    if inputs.work.mode != STATS:
        raise Skipped("has no backward")
    needs_gpu(inputs.work)
    _needs_ignored_last(inputs)
    log_softmax = needs("liger_kernel.ops.grpo_loss", "liger-kernel").fused_selective_log_softmax
    ids = inputs.batch.target[:, :-1].contiguous()
    return lambda logits: Values(None, F.pad(log_softmax(logits, ids, 1.0), (0, 1)))


def fla_grpo(overwrites: bool) -> Bind:
    def bind(inputs: Inputs) -> Function:
        work, batch = inputs.work, inputs.batch
        needs_loss(work, "grpo")
        if not work.on_policy:
            raise Skipped("takes no old log-probabilities: --on-policy")
        needs_gpu(work)
        _needs_ignored_last(inputs)
        grpo = needs("fla.modules.grpo", "flash-linear-attention").fused_grpo_loss
        assert batch.ref_logp is not None
        ids, ref = batch.target[:, :-1].contiguous(), batch.ref_logp[:, :-1].contiguous()

        def loss(logits: Tensor) -> Values:
            return Values(grpo(logits, ref, ids, batch.advantage, 0.04, inplace=overwrites).mean())

        return loss

    return bind


def flash_attn(overwrites: bool) -> Bind:
    def bind(inputs: Inputs) -> Function:
        needs_gpu(inputs.work)
        loss = needs("flash_attn.ops.triton.cross_entropy", "flash-attn").cross_entropy_loss
        target = inputs.batch.target

        def logp(logits: Tensor) -> Tensor:
            losses, _ = loss(logits.flatten(0, 1), target.flatten(), inplace_backward=overwrites)
            return -losses.view(target.shape)

        return _either(inputs, lambda logits: (logp(logits), None), logp)

    return bind


def quack(overwrites: bool) -> Bind:
    def bind(inputs: Inputs) -> Function:
        needs_gpu(inputs.work)
        loss = needs("quack.cross_entropy", "quack-kernels").cross_entropy
        target = inputs.batch.target

        def logp(logits: Tensor) -> Tensor:
            rows = logits.flatten(0, 1)
            losses = loss(rows, target.flatten(), reduction="none", inplace_backward=overwrites)
            return -losses.view(target.shape)

        return _either(inputs, lambda logits: (logp(logits), None), logp)

    return bind


PEERS = [
    Provider("eager", "log_softmax in fp32", _in_fp32(log_softmax)),
    Provider("eager", "log_softmax", _unconverted(log_softmax)),
    Provider("compile", "log_softmax in fp32", compiled, prepare=import_compiler),
    Provider("torch", "F.cross_entropy in fp32", _in_fp32(cross_entropy)),
    Provider("torch", "F.cross_entropy", _unconverted(cross_entropy)),
    Provider("trl", "selective_log_softmax in fp32", _in_fp32(trl), prepare=import_trl),
    Provider("trl", "selective_log_softmax", _unconverted(trl), prepare=import_trl),
    Provider("trl", "logprob_entropy", trl_head),
    Provider("liger", "LigerCrossEntropyLoss", liger_cross_entropy, overwrites=True),
    Provider("liger", "triton_grpo_loss", liger_grpo(False)),
    Provider("liger", "triton_grpo_loss", liger_grpo(True), overwrites=True),
    Provider("liger", "fused_selective_log_softmax", liger_log_softmax),
    Provider("fla", "fused_grpo_loss", fla_grpo(False)),
    Provider("fla", "fused_grpo_loss", fla_grpo(True), overwrites=True),
    Provider("flash-attn", "cross_entropy_loss", flash_attn(False)),
    Provider("flash-attn", "cross_entropy_loss", flash_attn(True), overwrites=True),
    Provider("quack", "cross_entropy", quack(False)),
    Provider("quack", "cross_entropy", quack(True), overwrites=True),
]
