"""TRL's loss head twice more, its own with its sums in another order and the oracle's; and what is within budget."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import trl.trainer.utils as utils
from torch import Tensor

from unirl_kernels.integrations.patching import Patch, Replacement
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
HEAD: Any = getattr(utils, "_ChunkedLogProbFunction", None)
"""The head of the TRL that is installed; None below 1.7, which has functions of logits alone."""

TAKEN = [] if HEAD is None else [name for name in inspect.signature(HEAD.forward).parameters if name != "ctx"]
"""What that head takes, in order."""

FUSED = "outputs" in TAKEN
"""Whether its trainers score tokens by that head; before 1.15 they do by functions of logits."""


def by_oracle(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None = None,
    scale: float = 1.0,
    outputs: Sequence[str] = OUTPUTS,
) -> tuple[Tensor | None, ...]:
    """What ``HEAD.apply`` gives from 1.15 on, by the oracle, in the dtype of the operands."""
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logits = oracle.apply_readout(logits, temperature, softcap, scale)
    frozen = logits.detach()
    observed = (frozen.softmax(-1).square().sum(-1).log(), frozen.mean(-1), frozen.argmax(-1) == targets)
    values = zip(OUTPUTS, (oracle.entropy(logits), *observed), strict=True)
    return oracle.log_probs(logits, targets), *(x if name in outputs else None for name, x in values)


def check(got: Sequence[Any], plain: Sequence[Any], truth: Sequence[Any], statistics: int) -> None:
    """Assert that all are within budget: first log-probabilities and other statistics, then gradients."""
    size = max(1.0, truth[0].abs().max().item())
    for i, (a, b, true) in enumerate(zip(got, plain, truth, strict=True)):
        if true.dtype is torch.bool:
            assert torch.equal(a, true), i
        else:
            condition = condition_of(true, size) if i < statistics else 2 * size
            assert not (problems := violations(a, b, true, condition=condition)), f"{i}: {problems}"


def exact() -> Patch:
    """Let TRL's trainers have their fused head in fp64, of the factors that their own multiplies."""

    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        factors = [x.to(dtype).double() for x in (hidden, weight)]
        with torch.autocast(device, enabled=False):
            return by_oracle(*factors, None if bias is None else bias.double(), *rest)

    return Patch([Replacement(HEAD, SimpleNamespace(apply=apply), "trl")])


def reordered(seed: int) -> Patch:
    """Let TRL's trainers have their own head, of tokens and features in another order and of logits that are shifted.

    The same up to rounding.
    """
    return in_orders(itertools.repeat(seed))


def in_orders(seeds: Iterator[int]) -> Patch:
    """``reordered``, with a seed for each call: a policy and an equal reference differ by rounding, too."""
    random = torch.Generator().manual_seed(0)
    shift = torch.rand((), generator=random)
    logp, entropy = utils.selective_log_softmax, utils.entropy_from_logits

    def order(n: int, seed: int) -> Tensor:
        return torch.randperm(n, generator=random.manual_seed(seed))

    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> Any:
        seed = next(seeds)
        tokens, features = order(len(weight), seed), order(weight.shape[1], seed)
        bias = None if bias is None else bias[tokens]
        return HEAD.apply(hidden[:, features], weight[tokens][:, features], bias, tokens.argsort()[targets], *rest)

    def shuffled(logits: Tensor) -> tuple[Tensor, Tensor]:
        tokens = order(logits.shape[-1], next(seeds))
        return logits[..., tokens] + shift, tokens.argsort()

    def selected(logits: Tensor, index: Tensor, *rest: Any, **named: Any) -> Tensor:
        logits, columns = shuffled(logits)
        return logp(logits, columns[index], *rest, **named)

    def entropy_of(logits: Tensor, *rest: Any) -> Tensor:
        return entropy(shuffled(logits)[0], *rest)

    def both_of(logits: Tensor, index: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        logits, columns = shuffled(logits)
        return both(logits, columns[index], *rest, **named)

    pairs = [(HEAD, SimpleNamespace(apply=apply)), (logp, selected), (entropy, entropy_of)]
    both = getattr(utils, "selective_log_softmax_and_entropy", None)
    if both is not None:
        pairs.append((both, both_of))
    return Patch([Replacement(old, new, "trl") for old, new in pairs])
