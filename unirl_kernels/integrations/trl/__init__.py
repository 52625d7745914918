"""TRL's trainers on this package's kernels. ``patch()`` keeps every loss, entropy and gradient as before.

``fuse(trainer)`` computes a trainer's loss and gradient in one pass.

TRL 0.24 to 1.16 were tried. From 1.15 on, its trainers score tokens with a fused head, an autograd function, which is
replaced. Earlier releases, and experimental trainers, also use functions of logits, which are replaced in every module
that has imported them. Releases below 1.7 have only these functions.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, ParamSpec

import torch
from torch import Tensor

from unirl_kernels.api import linear_token_observations, linear_token_stats, token_stats
from unirl_kernels.batch import IGNORE
from unirl_kernels.integrations.one_pass import awaited
from unirl_kernels.integrations.patching import Patch, Replacement, Switch, known
from unirl_kernels.integrations.rows import whole_rows
from unirl_kernels.integrations.trl.configuration import loss as loss
from unirl_kernels.integrations.trl.one_pass import OnePassGRPO, OnePassRLOO, OnePassTrainer
from unirl_kernels.integrations.trl.one_pass_judged import OnePassDPO, OnePassKTO, OnePassSFT
from unirl_kernels.integrations.versions import check_release
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout

P = ParamSpec("P")

FIRST, LAST = "0.24", "1.16"
"""Releases that were tried, both included."""

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""Outputs of the fused head besides log-probabilities."""

MAKERS_OF_HEADS = ("add_fused_lm_head", "patch_chunked_lm_head")
"""The functions that install TRL's fused head, by release. A TRL without them has no fused head."""

ZERO3 = "weight must not be partitioned by ZeRO-3: TRL gathers it for the backward of its own head only"

FUSED: tuple[type[OnePassTrainer], ...] = (OnePassGRPO, OnePassRLOO, OnePassDPO, OnePassKTO, OnePassSFT)
"""The implementation of ``fuse`` for each class of trainers."""

_switch = Switch()


def patch(plan: Plan = Plan()) -> Patch:
    """Let TRL compute log-probabilities, entropies and their gradients with this package, until ``unpatch()``.

    Create and use trainers as before. Patching again only changes the plan. In a ``with`` statement the patch ends with
    the block.

    TRL's other code is not replaced: distillation, and before 1.15 the losses of ``use_liger_kernel=True`` and of SFT,
    except ``loss_type="dft"``.

    Args:
        plan: how the machine computes them.

    Returns:
        ``Patch``.

    Raises:
        ImportError: when TRL is not installed.
        RuntimeError: when TRL does not have the expected functions. A release that was not tried gives a warning, see
            ``integrations.versions``.
        ValueError: later, when a trainer is created under DeepSpeed's ZeRO-3, whose weights are sharded.
    """
    check_release("trl", FIRST, LAST)
    _switch.off()
    utils = importlib.import_module("trl.trainer.utils")
    return _switch.on([*_of_logits(utils, plan), *_of_hidden_states(utils, plan)])


def unpatch() -> None:
    """Restore TRL's own functions. Without a patch it does nothing."""
    _switch.off()


def fuse(trainer: Any, plan: Plan = Plan()) -> None:
    """Let a trainer compute its loss and gradient in one pass of the model's head, until ``unfuse(trainer)``.

    This takes three matmuls of tokens by vocabulary instead of the four of ``patch()``. The loss is
    ``loss(trainer.args)``, computed by ``fused_linear_loss``. TRL's own code computes the logged values from the
    log-probabilities, entropies and observations of that pass. A loss of sequence or pair scope takes three matmuls if
    a sequence or pair fits a chunk, else four. DPO and KTO first score their reference with the trainer's
    ``compute_ref_log_probs``.

    This also calls ``patch(plan)``, for old and reference log-probabilities. ``unfuse`` does not undo that patch.
    Options are read once, in this call; one that changes later raises at the next step.

    Args:
        trainer: a GRPOTrainer, RLOOTrainer, DPOTrainer, KTOTrainer or SFTTrainer of TRL 1.16, before ``train()``.
        plan: how the machine computes it.

    Raises:
        ImportError, RuntimeError: as ``patch`` and ``loss`` do.
        TypeError: when the trainer has another class, or a method of its loss is not TRL's own.
        ValueError: when one pass cannot compute what the configuration asks for (a router's loss, torch_compile,
            DataParallel, FSDP, ZeRO-3, a parallelism_config, DPO's use_weighting, DPO's keep_end with ipo or
            sigmoid_norm, SFT's compute_loss_func, and what ``loss`` refuses); names the option. Nothing is changed
            then.
    """
    check_release("trl", LAST, LAST)
    one_pass = _one_pass(trainer)
    patch(plan)
    setattr(trainer, one_pass.REPLACED, one_pass.compute_loss)


def _one_pass(trainer: Any) -> OnePassTrainer:
    import trl

    for kind in FUSED:
        if isinstance(trainer, getattr(trl, kind.KIND)):
            return kind(trainer)
    known = ", ".join(kind.KIND for kind in FUSED)
    raise TypeError(f"trainer must be one of {known} of TRL, got {type(trainer).__name__}: use patch() instead")


def unfuse(trainer: Any) -> None:
    """Restore a trainer's own loss. Without ``fuse`` it does nothing.

    Args:
        trainer: the trainer.
    """
    for name in {kind.REPLACED for kind in FUSED}:
        if isinstance(getattr(vars(trainer).get(name), "__self__", None), OnePassTrainer):
            delattr(trainer, name)


def _of_logits(utils: ModuleType, plan: Plan) -> list[Replacement]:
    scored = ("logits", "index", "temperature", "row_mask")
    entropy_too = ("logits", "index", "entropy_requires_grad", "temperature", "row_mask")
    functions = LogitFunctions(plan)
    table: list[tuple[Any, tuple[tuple[str, ...], ...]]] = [
        (functions.selective_log_softmax, (scored[:2], scored)),
        (functions.entropy_from_logits, (("logits", "chunk_size"),)),
    ]
    if hasattr(utils, "selective_log_softmax_and_entropy"):
        table.append((functions.selective_log_softmax_and_entropy, (entropy_too,)))
    return [Replacement(known(utils, f.__name__, *signatures)[0], f, "trl") for f, signatures in table]


def _of_hidden_states(utils: ModuleType, plan: Plan) -> list[Replacement]:
    if not any(hasattr(utils, name) for name in MAKERS_OF_HEADS):
        return []
    head = FusedHead(plan)
    readout = ("temperature", "chunk_size", "final_logit_softcapping", "logit_scale")
    versions = {
        ("last_hidden", "weight", "targets", *readout): head.without_bias,
        ("last_hidden", "weight", "bias", "targets", *readout): head.with_entropy,
        ("hidden", "weight", "bias", "targets", *readout, "outputs"): head.score,
    }
    theirs, signature = known(utils, "_ChunkedLogProbFunction", *versions)
    replacements = [Replacement(theirs, SimpleNamespace(apply=versions[tuple(signature)]), "trl")]
    if hasattr(utils, "add_fused_lm_head"):
        replacements.append(Replacement(utils.add_fused_lm_head, _refusing_zero3(utils.add_fused_lm_head), "trl"))
    if hasattr(utils, "_use_triton"):
        # Without a Triton device TRL scores every position, including prompts and padding. Here only valid ones are
        # scored.
        chooser, _ = known(utils, "_use_triton", ("device",))
        replacements.append(Replacement(chooser, lambda device: True, utils.__name__))
    return replacements


def _refusing_zero3(add_fused_lm_head: Callable[P, None]) -> Callable[P, None]:
    """Refuse ZeRO-3 when a trainer is created, before anything is sampled."""

    @functools.wraps(add_fused_lm_head)
    def add(*args: P.args, **kwargs: P.kwargs) -> None:
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        if is_deepspeed_zero3_enabled():
            raise ValueError(ZERO3)
        add_fused_lm_head(*args, **kwargs)

    return add


class LogitFunctions:
    """TRL's functions of logits, with their names.

    Log-probabilities and entropies are float32, also for 16-bit logits. TRL's own are then rounded to 16 bits, an error
    of up to 0.06.

    Args:
        plan: how the machine computes them.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def selective_log_softmax(
        self, logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        """log pi of the tokens in ``index``, [...], or [..., K] for K tokens per position; 0 where the mask is 0."""
        if index.dim() == logits.dim():
            return self._several(logits, index, temperature, row_mask)
        return self.selective_log_softmax_and_entropy(logits, index, True, temperature, row_mask)[0]

    def entropy_from_logits(self, logits: Tensor, chunk_size: int = 128) -> Tensor:
        """H of each position, [...]."""
        index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        return self.selective_log_softmax_and_entropy(logits, index)[1]

    def selective_log_softmax_and_entropy(
        self,
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """log pi of the token in ``index``, and H; [...], 0 where the mask is 0."""
        target = index.long() if row_mask is None else torch.where(row_mask == 0, IGNORE, index.long())
        rows = whole_rows(logits)
        readout = Readout(temperature=float(temperature))
        stats = token_stats(rows, target.reshape(rows.shape[:-1]), readout=readout, plan=self._plan)
        # Copies, since trainers write zeros into the results, and the gradient needs the statistics.
        logp, entropy = (x.view(index.shape).clone() for x in (stats.logp, stats.entropy))
        return logp, entropy if entropy_requires_grad else entropy.detach()

    def _several(self, logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None) -> Tensor:
        rows = whole_rows(logits).reshape(-1, logits.shape[-1])
        target = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
        lse = token_stats(rows, target, readout=Readout(temperature=float(temperature)), plan=self._plan).lse
        logp = logits.gather(-1, index).to(lse.dtype) / temperature - lse.view(*logits.shape[:-1], 1)
        return logp if row_mask is None else logp.masked_fill(row_mask == 0, 0.0)


class FusedHead:
    """TRL's fused head, with the signature of each of its versions.

    Args:
        plan: how the machine computes it.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def without_bias(self, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        """TRL 1.7 to 1.10: log-probability and entropy. TRL's own drops the gradient of the entropy, this one does
        not."""
        return self.with_entropy(hidden, weight, None, *rest)

    def with_entropy(self, *given: Any) -> tuple[Tensor | None, ...]:
        """TRL up to 1.14: log-probability and entropy."""
        score: Callable[..., tuple[Tensor | None, ...]] = self.score
        return score(*given, outputs=("entropy",))[:2]

    def score(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """TRL from 1.15 on: log-probability [N] and those of ``OUTPUTS`` that are asked for; None for the others.

        Args:
            hidden: [N, D].
            weight: [V, D].
            bias: [V] or None.
            targets: [N] int64.
            temperature, final_logit_softcapping, logit_scale: how logits become a distribution.
            chunk_size: of TRL's tiles; ``Plan.max_chunk_bytes`` takes its place.
            outputs: names of what is asked for.

        Raises:
            ValueError: when the weight is not whole (ZeRO-3), or something unknown is asked for.
        """
        if hasattr(weight, "ds_id"):
            raise ValueError(ZERO3)
        if unknown := set(outputs) - {"log_probs", *OUTPUTS}:
            raise ValueError(f"outputs must be among {', '.join(OUTPUTS)}, got {', '.join(sorted(unknown))}")
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        readout = Readout(float(temperature), final_logit_softcapping, float(logit_scale))
        how: dict[str, Any] = {"bias": bias, "readout": readout, "plan": self._plan}
        work = awaited()
        if not {"log_sum_sq_probs", "mean_logits", "is_top1"} & set(outputs):
            if work is None:
                logp, entropy, _ = linear_token_stats(hidden, weight, targets, **how)
            else:
                logp, entropy = work.run(hidden, weight, targets, **how)
            return logp, entropy if "entropy" in outputs else None, None, None, None
        observe = linear_token_observations if work is None else work.observe
        seen = observe(hidden, weight, targets, **how)
        found = (seen.entropy, seen.log_sum_sq_probs, seen.mean_logit, seen.argmax == targets)
        return seen.logp, *(x if name in outputs else None for name, x in zip(OUTPUTS, found, strict=True))
