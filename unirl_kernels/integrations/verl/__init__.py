"""verl's functions on this package's kernels, with verl's names, signatures and results.

verl 0.9 was tried. ``patch()`` replaces verl's functions:

- in ``verl.utils.torch_functional``, for log-probabilities and entropies of logits, padding removed or not: the engines
  for FSDP, VeOmni, AutoModel and torchtitan, and PrefixGrouper;
- in ``verl.utils.experimental.torch_functional``, for ``use_fused_kernels`` with ``impl_backend: torch`` or ``liger``;
- in ``verl.utils.kernel.linear_cross_entropy``, for ``impl_backend: triton``, which then needs no Triton (but
  ``use_remove_padding``, as verl's own does), and for Megatron's fused forward, the vocabulary split or not;
- in ``verl.utils.megatron.tensor_parallel``, where Megatron is installed, for log-probabilities and entropies of logits
  whose vocabulary is split (see ``megatron.py``).

Everything else is not replaced: VeOmni's own fused head, top-k distillation, and ``calculate_sum_pi_squared``, also for
a split vocabulary. verl's engines refuse a temperature per sample together with ``use_fused_kernels``.

Log-probabilities and entropies are float32, also for 16-bit operands. Some of verl's own are rounded to 16 bits (logits
of the torch backend, entropies, log-probabilities without flash-attn).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.api import linear_token_stats, token_stats
from unirl_kernels.integrations.one_pass import awaited
from unirl_kernels.integrations.patching import Patch, Replacement, Switch, known, parameters_of
from unirl_kernels.integrations.rows import entropy, whole_rows
from unirl_kernels.integrations.verl import megatron
from unirl_kernels.integrations.verl.configuration import loss as loss
from unirl_kernels.integrations.verl.one_pass import OnePassActor
from unirl_kernels.integrations.versions import check_release
from unirl_kernels.plan import Plan
from unirl_kernels.ranks.shard import VocabShard
from unirl_kernels.readout import Readout

TRIED = "0.9"

OF_SHARDS = ("vocab_parallel_log_probs_from_logits", "vocab_parallel_entropy", "vocab_parallel_entropy_with_chunking")
"""Functions of ``megatron.py`` that replace verl's."""

_switch = Switch()


def patch() -> Patch:
    """Let verl compute log-probabilities, entropies and their gradients with this package, until ``unpatch()``.

    Call it in every worker process before the model is built, for instance in a module that
    ``VERL_USE_EXTERNAL_MODULES`` names: verl imports that module in each worker. Patching again changes nothing. In a
    ``with`` statement the patch ends with the block.

    Returns:
        ``Patch``.

    Raises:
        ImportError: when verl or one of its requirements is not installed.
        RuntimeError: when verl does not have the expected functions. A release that was not tried gives a warning, see
            ``integrations.versions``.
    """
    check_release("verl", TRIED, TRIED)
    _switch.off()
    of_logits = importlib.import_module("verl.utils.torch_functional")
    of_hidden = importlib.import_module("verl.utils.experimental.torch_functional")
    of_kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    replaced: list[tuple[Any, Any]] = [
        (of_logits, logprobs_from_logits),
        (of_logits, entropy_from_logits),
        (of_logits, entropy_from_logits_with_chunking),
        (of_hidden, FusedLinearForPPO),
    ]
    if all(importlib.util.find_spec(name) is not None for name in ("megatron", "megatron.core")):
        of_shards = importlib.import_module("verl.utils.megatron.tensor_parallel")
        replaced += [(of_shards, getattr(megatron, name)) for name in OF_SHARDS]
    replacements = [Replacement(known(m, new.__name__, parameters_of(new))[0], new, "verl") for m, new in replaced]
    apply = known(of_kernel, "LinearCrossEntropy", parameters_of(linear_cross_entropy))[0].apply
    if getattr(of_kernel, "linear_cross_entropy", None) != apply:
        raise RuntimeError(f"looked for linear_cross_entropy = LinearCrossEntropy.apply in {of_kernel.__name__}")
    # Each access to ``apply`` makes a new object, so replace the one that verl's modules hold.
    replacements.append(Replacement(of_kernel.linear_cross_entropy, linear_cross_entropy, "verl"))
    return _switch.on(replacements)


def unpatch() -> None:
    """Restore verl's own functions. Without a patch it does nothing."""
    _switch.off()


def fuse(worker: Any) -> None:
    """Let an actor compute its loss and gradient in one pass of the model's head, until ``unfuse(worker)``.

    This takes three matmuls of tokens by vocabulary instead of the four of ``patch()``. The loss is
    ``loss(actor_config)``, computed by ``fused_linear_loss`` with the counts of each micro-batch. verl's own
    ``ppo_loss`` computes the logged values from the log-probabilities and entropies of that pass. Prompts take no part
    in the matmuls.

    This also calls ``patch()``, for the old and reference policies. ``unfuse`` does not undo that patch.

    Args:
        worker: the actor's TrainingWorker after ``set_loss_fn``, or what has its ``engine`` and ``loss_fn``: verl's
            FSDP engine with ``use_fused_kernels`` and ``use_remove_padding``, and ``partial(ppo_loss, config=...)``.

    Raises:
        ImportError, RuntimeError: as ``patch`` and ``loss`` do.
        TypeError: when the engine or the loss function is another (Megatron, VeOmni, distillation, critics).
        ValueError: when one pass cannot make what the configuration asks for (no ``use_fused_kernels`` or
            ``use_remove_padding``, a model without verl's fused forward, Ulysses, ``clip_cov``,
            ``calculate_sum_pi_squared``, ``seq-mean-token-sum-norm`` without ``loss_scale_factor``, and what ``loss``
            refuses), by the name of the option; nothing is changed then. Later, from a micro-batch that says otherwise
            than the configuration.
    """
    check_release("verl", TRIED, TRIED)
    one_pass = OnePassActor(worker)
    patch()
    worker.engine.forward_step = one_pass.forward_step


def unfuse(worker: Any) -> None:
    """Give an actor its own loss back. Without ``fuse`` it does nothing.

    Args:
        worker: the TrainingWorker.
    """
    engine = worker.engine
    if isinstance(getattr(vars(engine).get("forward_step"), "__self__", None), OnePassActor):
        del engine.forward_step


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log pi of each label.

    Args:
        logits: [..., V].
        labels: [...] int64.
        inplace_backward: let the gradient take the logits' memory, where they were computed by something that does
            not need them any more; they cannot be used after the backward. A leaf and its views are left alone.

    Returns:
        [...] float32, also for 16-bit logits.
    """
    of_leaf = logits.is_leaf or (logits._base is not None and logits._base.is_leaf)
    rows, plan = whole_rows(logits), Plan(overwrite_logits=inplace_backward and not of_leaf)
    return token_stats(rows, labels.reshape(rows.shape[:-1]), plan=plan).logp.view(logits.shape[:-1])


def entropy_from_logits(logits: Tensor) -> Tensor:
    """H of each distribution, [...] float32, from logits [..., V]."""
    return entropy(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """H of each distribution, [...] float32, from logits [..., V].

    Args:
        logits: [..., V].
        chunk_size: of verl's chunks, which keep its copies of the logits small; here there are none.
    """
    return entropy_from_logits(logits)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """log pi of each label, and H, from hidden states and the head's weight; the logits are never formed as a whole.

    Args:
        hidden: [..., D].
        weight: [V, D].
        labels: [...] int64, T of them.
        temperature: of the logits, > 0; or, which verl's own cannot, one per label.
        reduction: of the log-probabilities: ``none``, ``sum`` or ``mean``.
        dist_process_group: of a vocabulary that is split evenly over processes; weight is [V / n, D] then. The gradient
            of hidden is this process's part of the sum, as Megatron's regions sum it.

    Returns:
        log-probabilities, [T] or 0-dim, and entropies, [T]; float32, differentiable.

    Raises:
        ValueError: when the reduction is not known.
    """
    reductions: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}
    if reduction.lower() not in reductions:
        raise ValueError(f"reduction must be one of {', '.join(reductions)}, got {reduction!r}")
    shard = None
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        shard = megatron.even_shard(dist_process_group, weight.shape[0], hidden="partial")
    logp, h = _scored(hidden, weight, labels, temperature, shard)
    return reductions[reduction.lower()](logp), h


class FusedLinearForPPO(torch.nn.Module):
    """log pi of each label, and H, from hidden states and the head's weight; the logits are never formed as a whole.

    Args:
        chunk_size: of verl's chunks of tokens; the kernels choose theirs.
        impl_backend: ``torch`` or ``liger``, of which verl has two heads; here they are one.

    Raises:
        ValueError: when the backend is another.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend must be torch or liger, got {impl_backend!r}")

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """log pi of each label, and H.

        Args:
            hidden_states: [B, L, D] or [T, D].
            vocab_weights: [V, D].
            input_ids: [B, L] or [T], the labels.
            temperature: of the logits, > 0; or, which verl's own cannot, one per label.

        Returns:
            log-probabilities and entropies, of input_ids' shape; float32, differentiable.
        """
        logp, h = _scored(hidden_states, vocab_weights, input_ids, temperature)
        return logp.view(input_ids.shape), h.view(input_ids.shape)


def _scored(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor, shard: VocabShard | None = None
) -> tuple[Tensor, Tensor]:
    """log pi of each label, and H, [T]; or a loss that is awaited, and both without a gradient."""
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(labels.shape).reshape(-1).float()
    rows, target = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    how: Any = {"readout": Readout(temperature=temperature), "shard": shard}
    if (work := awaited()) is not None:
        return work.run(rows, weight, target, **how)
    logp, h, _ = linear_token_stats(rows, weight, target, **how)
    return logp, h
