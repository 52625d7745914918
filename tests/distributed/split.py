"""Cases of split vocabularies, and what is compared: shards of one row against the whole row in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import unirl_kernels as uk
from tests.cases import BY_NAME, RAGGED, LossCase, Shape, make_case
from tests.linear import SEQUENCE_SCOPE, CustomCase
from unirl_kernels.objectives import BetaDPO, Tokens
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations

VOCAB = 101
BATCH_SCOPE = CustomCase("beta_dpo", lambda: uk.Loss(BetaDPO(), uk.PairMean()), lambda logits, batch: logits.sum())
LOSSES: list[Any] = [BY_NAME["grpo"], SEQUENCE_SCOPE, BY_NAME["dpo"], BATCH_SCOPE]
"""One of each scope."""

WIDTHS = {
    2: [(51, 50), (10, 91), (101, 0), (0, 101), (60, 60), (101, 8)],
    4: [(26, 25, 25, 25), (50, 0, 51, 0), (0, 1, 99, 1), (30, 30, 30, 30), (101, 8, 0, 8)],
}
"""Number of columns of each rank: uneven, none, with padding, only padding."""


@dataclass(frozen=True)
class Case:
    shape: Shape
    offset: float = 0.0  # added to all logits
    readout: uk.Readout = uk.Readout()


CASES = [
    Case(Shape("small", "fp32", RAGGED, VOCAB)),
    Case(Shape("packed", "cu_seqlens", RAGGED, VOCAB, packed=True), readout=uk.Readout(temperature=0.7)),
    Case(Shape("masked", "-inf columns, a shard of them alone", RAGGED, VOCAB, fill="masked")),
    Case(Shape("certain", "p_y -> 1", RAGGED, VOCAB, fill="certain")),
    Case(Shape("offset", "large logits", RAGGED, VOCAB), 1000.0),
    Case(Shape("bf16", "half the bits", RAGGED, VOCAB, torch.bfloat16), readout=uk.Readout(softcap=20.0)),
]


def shard_of(widths: Sequence[int], rank: int, **how: Any) -> uk.VocabShard:
    return uk.VocabShard(dist.group.WORLD, sum(widths[:rank]), VOCAB, **how)


def columns_of(x: Tensor, widths: Sequence[int], rank: int, fill: float = torch.nan, dim: int = -1) -> Tensor:
    """This rank's columns of x. Columns of padding hold ``fill``, which must not change results."""
    start, end = sum(widths[:rank]), sum(widths[: rank + 1])
    own = x.narrow(dim, min(start, VOCAB), max(0, min(end, VOCAB) - start))
    shape = list(own.shape)
    shape[dim] = widths[rank] - shape[dim]
    return torch.cat([own, x.new_full(shape, fill)], dim)


def make(case: Case, loss: LossCase | CustomCase) -> tuple[Tensor, uk.Batch]:
    logits, batch = make_case(case.shape, loss)
    if case.shape.fill == "masked":
        y = batch.target[0].clamp(min=0)
        logits[0, :, : VOCAB // 2] = torch.where(torch.arange(VOCAB // 2) == y[:, None], 1.0, -torch.inf)
    return (logits.float() + case.offset).to(logits.dtype), batch


@dataclass(frozen=True)
class Found:
    loss: Tensor
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    d_logits: Tensor


def whole(logits: Tensor, batch: uk.Batch, loss: uk.Loss, readout: uk.Readout, dtype: torch.dtype) -> Found:
    """Loss and gradient of all columns, written naively in a dtype."""
    x = logits.clone().to(dtype).requires_grad_()
    z = oracle.apply_readout(x, readout.temperature, readout.softcap, readout.scale)
    used = batch.target != uk.IGNORE
    entropy = torch.where(used, oracle.entropy(torch.where(z == -torch.inf, -1e30, z)), 0)
    lse = torch.where(used, torch.logsumexp(z, -1), 0)
    stats = oracle.log_probs(z, batch.target), entropy, lse
    value = loss.composed(Tokens(batch, *stats), loss.weights(batch))
    value.backward()
    assert x.grad is not None
    return Found(value.detach(), *(s.detach() for s in stats), x.grad)


def split(
    logits: Tensor, batch: uk.Batch, loss: uk.Loss, readout: uk.Readout, widths: Sequence[int], rank: int, plan: uk.Plan
) -> Found:
    """The same, computed by the package from a shard."""
    x = columns_of(logits, widths, rank).requires_grad_()
    used = x * 1 if plan.overwrite_logits else x
    out = uk.fused_loss(used, batch, loss, readout=readout, plan=plan, shard=shard_of(widths, rank))
    out.loss.backward()
    assert x.grad is not None
    return Found(out.loss.detach(), out.logp, out.entropy, out.lse, x.grad)


def problems(found: Found, case: Case, logits: Tensor, batch: uk.Batch, loss: uk.Loss, own: Callable[..., Any]) -> str:
    """Text that names the values that exceed their budgets; empty if none does."""
    truth = whole(logits, batch, loss, case.readout, torch.float64)
    plain = whole(logits, batch, loss, case.readout, torch.float32)
    scale = truth.lse.abs().max().item()
    said = []
    for name in ("loss", "logp", "entropy", "lse"):
        x, p, t = (getattr(group, name) for group in (found, plain, truth))
        wrong = violations(x, p.float(), t, condition=condition_of(t, scale))
        said += [f"{name}: {text}" for text in wrong]
    p, t = own(plain.d_logits, fill=0), own(truth.d_logits, fill=0)
    for text in violations(found.d_logits, p.to(logits.dtype), t, condition=max(1.0, scale)):
        said.append(f"d_logits: {text}")
    return "; ".join(said)


def same_bits(x: Tensor) -> bool:
    """Whether x has the same bits on all ranks."""
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x.contiguous())
    return all(torch.equal(x, other) for other in everyone)


class Traffic(TorchDispatchMode):
    """Bytes that a rank sends by each functional collective, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("_c10d_functional::") and "wait" not in name:
            self.sent.append((name.split("::")[1].split(".")[0], args[0].nbytes))
        return func(*args, **(kwargs or {}))


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute inside a ``with`` block, to plant a fault."""
    before = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
