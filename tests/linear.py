"""Linear heads: cases, and the comparison of losses and gradients with the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME, LossCase, Shape, make_target
from tests.runners import RUNNERS, Runner
from unirl_kernels.backends import COMPOSED, choose, load
from unirl_kernels.objectives import Tokens
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations

WIDTH = 12
RAGGED = Shape("ragged", "a sequence of no tokens, prompts and padding", (3, 1, 0, 4), 37)
PACKED = replace(RAGGED, name="packed", packed=True)
NOTHING = Shape("nothing", "every token ignored", (0, 0), 37)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSSES = [BY_NAME[name] for name in ("sft", "rft", "online_rft", "dpo", "ppo", "grpo", "dpo_mean", "grpo_token_mean")]


NATIVE = [runner for runner in RUNNERS if not runner.interpreted]


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Operands of a head, as a caller passes them, and the batch."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    batch: uk.Batch

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    def to(self, dtype: torch.dtype) -> LinearHead:
        operands = (None if x is None else x.detach().to(dtype) for x in self.operands)
        return LinearHead(*operands, self.batch)

    @property
    def used(self) -> LinearHead:
        """With zeros where hidden states are of ignored tokens: what the oracle gets."""
        hidden = self.hidden.masked_fill(~self.batch.valid.unsqueeze(-1), 0)
        return LinearHead(hidden, self.weight, self.bias, self.batch)


class Result(NamedTuple):
    loss: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None
    logp: Tensor
    entropy: Tensor


GRADIENTS = ("d_hidden", "d_weight", "d_bias")


@dataclass(frozen=True)
class CustomCase:
    """An objective of one's own, with its oracle: loss of logits, in their dtype, and batch."""

    name: str
    make: Callable[[], uk.Loss]
    oracle: Callable[[Tensor, uk.Batch], Tensor]
    verdicts: bool = False

    def __str__(self) -> str:
        return self.name


class SequenceRatio:
    """GSPO's clipped ratio of whole sequences (Zheng et al. 2025, arXiv:2507.18071, eq. 5), and an entropy bonus."""

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        ratio = t.to_tokens(torch.exp(t.sequence_mean(t.logp - t.old_logp)))
        surrogate = torch.minimum(ratio * t.advantage, ratio.clamp(0.9, 1.1) * t.advantage)
        return -surrogate - 0.01 * t.to_tokens(t.sequence_mean(t.entropy))


def sequence_ratio(logits: Tensor, batch: uk.Batch) -> Tensor:
    logp, entropy = oracle.log_probs(logits, batch.target).reshape(-1), oracle.entropy(logits).reshape(-1)
    total = logp.new_zeros(())
    tokens = oracle.sequences(batch)
    for o, advantage in zip(tokens, batch.advantage, strict=True):
        if len(o):
            ratio = torch.exp((logp[o] - batch.old_logp.reshape(-1)[o]).sum() / len(o))
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
            total = total - (surrogate + 0.01 * entropy[o].sum() / len(o)) / len(tokens)
    return total


SEQUENCE_SCOPE = CustomCase("sequence_ratio", lambda: uk.Loss(SequenceRatio()), sequence_ratio)

SCOPES = [BY_NAME["grpo"], BY_NAME["dpo"], SEQUENCE_SCOPE]
CHUNKED = (3, 5)
"""Tokens per chunk: one that no pair fits, one that every pair and sequence fits."""


def of(runners: list[Runner], losses: list[LossCase | CustomCase]) -> pytest.MarkDecorator:
    """Every loss on every runner; objectives that look beyond single tokens are composed."""
    found = [(p, loss) for p in runners for loss in losses if p.kernel == COMPOSED or loss.make().scope == "token"]
    return pytest.mark.parametrize(("runner", "loss"), found, ids=str)


def make_head(
    shape: Shape,
    loss: LossCase | CustomCase,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    bias: bool = True,
    seed: int = 0,
) -> LinearHead:
    """A head whose logits look like a trained model's; garbage wherever a token is ignored."""
    torch.manual_seed(seed)
    target, cu_seqlens = make_target(shape)
    weight = torch.randn(shape.vocab, WIDTH)
    hidden = torch.randn(*target.shape, WIDTH) * 0.6
    sure = torch.randint(0, 6, (*target.shape, 1)) / WIDTH
    hidden = (hidden + sure * weight[target.clamp(min=0)]).to(dtype)
    weight = weight.to(dtype)
    head_bias = torch.randn(shape.vocab).to(dtype) if bias else None
    exact = hidden.double() @ weight.double().t() + (0 if head_bias is None else head_bias.double())
    logp = oracle.log_probs(exact, target).float()
    old_logp, ref_logp = logp + 0.3 * torch.randn(logp.shape), logp + 0.2 * torch.randn(logp.shape)
    ignored = target == uk.IGNORE
    old_logp[ignored], ref_logp[ignored] = float("nan"), float("inf")
    hidden[ignored] = float("nan")
    hidden[..., 0][ignored] = float("inf")
    n = len(shape.lengths)
    advantage = (torch.arange(n) % 2).float() if loss.verdicts else torch.randn(n) + (torch.arange(n) % 2) * 2 - 1
    tensors = (hidden, weight, head_bias, target, advantage, old_logp, ref_logp, cu_seqlens)
    hidden, weight, head_bias, *fields = (None if x is None else x.to(device) for x in tensors)
    return LinearHead(hidden, weight, head_bias, uk.Batch(*fields))


def given(batch: uk.Batch) -> dict[str, Any]:
    """The arguments from which a batch was made."""
    return {f.name: getattr(batch, f.name) for f in fields(batch) if f.init}


def budget(head: LinearHead, tokens: int | None, backend: str) -> int | None:
    """``max_chunk_bytes`` for chunks of that many tokens; None for all in one."""
    if tokens is None:
        return None
    return tokens * load(backend).matmuls(head.weight, head.hidden.dtype).row_bytes


def plan_of(runner: Runner, head: LinearHead, tokens: int | None) -> uk.Plan:
    return replace(runner.plan(), max_chunk_bytes=budget(head, tokens, runner.backend))


def chosen_plan(head: LinearHead, tokens: int | None) -> uk.Plan:
    """The default backend on the head's device."""
    return uk.Plan(max_chunk_bytes=budget(head, tokens, choose(head.weight.device, None, None).backend))


def leaves_of(head: LinearHead, frozen: Sequence[str] = ()) -> list[Tensor | None]:
    names = ("hidden", "weight", "bias")
    found = zip(names, head.operands, strict=True)
    return [None if x is None else x.detach().clone().requires_grad_(name not in frozen) for name, x in found]


def gradients_of(value: Tensor, leaves: Sequence[Tensor | None], **how: bool) -> list[Tensor | None]:
    """Gradients of the leaves that want one, None for the others."""
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(value, wanted, **how))
    return [next(found) if x is not None and x.requires_grad else None for x in leaves]


def fused(
    head: LinearHead,
    loss: uk.Loss,
    plan: uk.Plan = uk.Plan(),
    readout: uk.Readout = uk.Readout(),
    frozen: Sequence[str] = (),
) -> Result:
    """Loss and gradients by the package."""
    hidden, weight, bias = leaves = leaves_of(head, frozen)
    out = uk.fused_linear_loss(hidden, weight, head.batch, loss, bias=bias, readout=readout, plan=plan)
    return Result(out.loss.detach(), *gradients_of(out.loss, leaves), out.logp, out.entropy)


def loss_of(head: LinearHead, leaves: list[Tensor | None], loss: LossCase | CustomCase, tokens: int | None) -> Tensor:
    hidden, weight, bias = leaves
    return uk.fused_linear_loss(hidden, weight, head.batch, loss.make(), bias=bias, plan=chosen_plan(head, tokens)).loss


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, factors: torch.dtype = torch.float32) -> Tensor:
    """hidden W^T + b. With bf16 factors the gradient of the product, one of them, is rounded, too."""
    product = hidden @ weight.t()
    if factors == torch.bfloat16 and product.requires_grad:
        product.register_hook(lambda d_product: d_product.to(factors).to(d_product.dtype))
    return product if bias is None else product + bias


def naive(
    head: LinearHead,
    loss: LossCase | CustomCase,
    readout: dict[str, Any],
    factors: torch.dtype = torch.float32,
) -> Result:
    """Loss and gradients by the oracle on the whole logits, in the dtype of the head.

    Args:
        factors: of the matmuls.
    """
    hidden, weight, bias = leaves = leaves_of(head)
    batch = head.batch
    logits = oracle.apply_readout(logits_of(hidden, weight, bias, factors), **readout)
    logp, entropy = oracle.log_probs(logits, batch.target), oracle.entropy(logits)
    if isinstance(loss, CustomCase):
        value = loss.oracle(logits, batch)
    else:
        value = oracle.loss(loss.algorithm, logits, batch, **loss.hyper)
    if not value.requires_grad:  # no token at all
        gradients = [None if x is None else torch.zeros_like(x) for x in leaves]
    else:
        gradients = gradients_of(value, leaves, materialize_grads=True)
    return Result(value.detach(), *gradients, logp.detach(), torch.where(batch.valid, entropy.detach(), 0))


def check(
    got: Result,
    head: LinearHead,
    loss: LossCase | CustomCase,
    factors: torch.dtype | None = None,
    **readout: Any,
) -> None:
    """Assert that loss, statistics and gradients are within budget, and exactly zero where tokens are ignored.

    Plain PyTorch gets the operands in fp32 and its gradients are rounded to their dtype. A backend may multiply bf16
    factors as such or in fp32; either is plain.

    Args:
        factors: of the matmuls, where not of the hidden states' dtype.
    """
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in readout.items()}
    truth = naive(head.used.to(torch.float64), loss, exact)
    plain = naive(head.used.to(torch.float32), loss, readout)
    size = max(1.0, largest_lse(head, exact))
    for name, condition in (
        ("loss", size * condition_of(truth.loss)),
        ("logp", condition_of(truth.logp, size)),
        ("entropy", condition_of(truth.entropy, size)),
    ):
        x, p, t = (getattr(result, name).reshape(-1) for result in (got, plain, truth))
        assert not (problems := violations(x, p, t, condition=condition)), f"{name}: {problems}"
    plains = [plain]
    if (factors or head.hidden.dtype) == torch.bfloat16:
        plains.append(naive(head.used.to(torch.float32), loss, readout, torch.bfloat16))
    check_gradients(got, plains, truth, head, condition=size)


def check_gradients(
    got: Result, plains: Sequence[Result], truth: Result, head: LinearHead, *, condition: float
) -> None:
    """Assert that each gradient is within the budget that one of the plain results sets."""
    for name, operand in zip(GRADIENTS, head.operands, strict=True):
        x, t = getattr(got, name), getattr(truth, name)
        if operand is None or x is None:  # frozen
            assert x is None, f"{name} of nothing"
            continue
        assert x.dtype == operand.dtype, f"{name} is {x.dtype}"
        rounded = (getattr(plain, name).to(x.dtype).float() for plain in plains)
        problems = [violations(x, p, t, condition=condition) for p in rounded]
        assert not all(problems), f"{name}: {problems}"
    if got.d_hidden is not None:
        assert not got.d_hidden[~head.batch.valid].any(), "an ignored token has a gradient"


def largest_lse(head: LinearHead, readout: dict[str, Any]) -> float:
    """The largest |log sum exp|: rounding errors of logits are relative to it."""
    hidden, weight, bias = head.used.to(torch.float64).operands
    logits = oracle.apply_readout(hidden @ weight.t() + (0 if bias is None else bias), **readout)
    return torch.logsumexp(logits, -1).abs().max().item()


class Count:
    """Logits made, and logits whose gradient was multiplied."""

    def __init__(self) -> None:
        self.logits = {"logits": 0, "d_hidden": 0, "add_d_weight": 0}

    def matmuls(self, logits: int) -> dict[str, float]:
        """How many matmuls of each kind were taken of that many logits."""
        return {name: n / logits for name, n in self.logits.items()}


@contextmanager
def changed_matmuls(monkeypatch: pytest.MonkeyPatch, backend: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the matmuls of a backend by ``change`` of them."""
    module = load(backend)
    original = module.matmuls
    with monkeypatch.context() as patch:
        patch.setattr(module, "matmuls", lambda *args: change(original(*args)))
        yield


class Wrapped:
    """Matmuls that call other ones; a base class."""

    def __init__(self, matmuls: Any) -> None:
        self.matmuls = matmuls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.matmuls, name)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, backend: str) -> Iterator[Count]:
    count = Count()

    class Counting(Wrapped):
        def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
            count.logits["logits"] += out.numel()
            self.matmuls.logits(hidden, bias, out)

        def d_hidden(self, d_logits: Tensor) -> Tensor:
            count.logits["d_hidden"] += d_logits.numel()
            return self.matmuls.d_hidden(d_logits)

        def add_d_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
            count.logits["add_d_weight"] += d_logits.numel()
            self.matmuls.add_d_weight(d_logits, hidden, total, first)

    with changed_matmuls(monkeypatch, backend, Counting):
        yield count


def ends_of(batch: uk.Batch) -> list[int]:
    """Valid tokens up to the end of each sequence."""
    return list(itertools.accumulate(len(o) for o in oracle.sequences(batch)))
