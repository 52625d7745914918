"""Four computations of a loss and its gradients, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import unirl_kernels as uk
from examples.demo.head import LinearHead
from examples.demo.sources import Source
from unirl_kernels.testing import oracle

Gradients = dict[str, Tensor]
LossAndGradients = Callable[[], tuple[Tensor, Gradients]]

GRAD, HIDDEN_GRAD, WEIGHT_GRAD = "grad", "hidden_grad", "weight_grad"


@dataclass(frozen=True, eq=False)
class Computations:
    """Functions that compute the same loss, and its gradients by name.

    Args:
        fused: by this package.
        naive: ``oracle`` in the input's own dtype, as people write it.
        plain: the same in fp32 arithmetic.
        exact: the same in fp64.
        scale: size of the rounded values that the loss is computed from, see ``condition_of``.
    """

    fused: LossAndGradients
    naive: LossAndGradients
    plain: LossAndGradients
    exact: LossAndGradients
    scale: float = 1.0


def on_logits(source: Source, logits: Tensor, plan: uk.Plan) -> Computations:
    """The loss of a source and the gradient of its logits, ``GRAD``.

    Args:
        source: the loss and its batch.
        logits: [S, L, V], detached.
        plan: how the fused loss is computed.
    """
    leaf = logits.detach().requires_grad_()

    def exact() -> tuple[Tensor, Gradients]:
        wide = leaf.detach().double().requires_grad_()
        return _with_gradients(_reference(source, wide), {GRAD: wide})

    return Computations(
        lambda: _with_gradients(uk.fused_loss(leaf, source.batch, source.loss, plan=plan).loss, {GRAD: leaf}),
        lambda: _with_gradients(_reference(source, leaf), {GRAD: leaf}),
        lambda: _with_gradients(_reference(source, leaf.float()), {GRAD: leaf}),
        exact,
    )


def on_hidden(source: Source, hidden: Tensor, head: LinearHead, plan: uk.Plan) -> Computations:
    """The loss of a source and the gradients of hidden states and the head's weight, ``HIDDEN_GRAD, WEIGHT_GRAD``.

    The truth is that of the matmuls' operands: in bf16 the model's function is one of rounded weights. ``plain``
    multiplies them in fp32, and rounds the logits' gradient and the results to bf16, as every backward in bf16 does.

    Args:
        source: the loss and its batch.
        hidden: [S, L, D], detached.
        head: of the model.
        plan: how the fused loss is computed.
    """
    leaves = {HIDDEN_GRAD: hidden.detach().requires_grad_(), WEIGHT_GRAD: head.weight.detach().requires_grad_()}
    head = head.with_weight(leaves[WEIGHT_GRAD])

    def fused() -> tuple[Tensor, Gradients]:
        out = head.loss(leaves[HIDDEN_GRAD], source.batch, source.loss, plan)
        return _with_gradients(out.loss, leaves)

    def naive() -> tuple[Tensor, Gradients]:
        return _with_gradients(_reference(source, head.logits(leaves[HIDDEN_GRAD])), leaves)

    def plain() -> tuple[Tensor, Gradients]:
        operands = {name: x.to(head.dtype).float() for name, x in leaves.items()}
        logits = head.with_weight(operands[WEIGHT_GRAD]).raw_logits(operands[HIDDEN_GRAD])
        logits.register_hook(lambda gradient: gradient.to(head.dtype).float())
        return _with_gradients(_reference(source, head.read_out(logits)), leaves)

    def exact() -> tuple[Tensor, Gradients]:
        operands = {name: x.detach().to(head.dtype).double().requires_grad_() for name, x in leaves.items()}
        logits = head.with_weight(operands[WEIGHT_GRAD]).raw_logits(operands[HIDDEN_GRAD])
        return _with_gradients(_reference(source, head.read_out(logits)), operands)

    # Logits given are exact; logits computed are rounded, and a log-probability is no better than they are.
    with torch.no_grad():
        scale = head.token_stats(hidden, source.batch.target, plan).lse.abs().max().item()
    return Computations(fused, naive, plain, exact, scale)


def _reference(source: Source, logits: Tensor) -> Tensor:
    return oracle.loss(source.algorithm, logits, source.batch)


def _with_gradients(loss: Tensor, leaves: Gradients) -> tuple[Tensor, Gradients]:
    # Not backward(): it would copy a gradient that somebody else holds into leaf.grad.
    found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, found, strict=True))
