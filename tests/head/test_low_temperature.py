"""A low temperature multiplies rounding errors of a head's logits, so forward and backward must use the same logits."""

from __future__ import annotations

import pytest
import torch

import unirl_kernels as uk
from tests.runners import RUNNERS, Runner
from unirl_kernels.backends import COMPOSED, load
from unirl_kernels.testing.budgets import violations


@pytest.mark.parametrize("runner", [p for p in RUNNERS if p.kernel == COMPOSED and not p.interpreted], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_statistics_of_sure_tokens(tokens: int, runner: Runner) -> None:
    """The backward computes the logits again, and a matmul of another shape may round differently."""
    hidden, weight = 3 * torch.randn(12, 40), torch.randn(47, 40)
    target = (hidden @ weight.t()).argmin(-1)  # far from the sure token, whose probability is 1
    upstream = torch.randn(12)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = hidden.to(dtype).requires_grad_()
        logp = torch.log_softmax(leaf @ weight.to(dtype).t() / 0.001, -1).gather(-1, target.unsqueeze(-1))
        results += torch.autograd.grad(logp.squeeze(-1), leaf, upstream.to(dtype))
    truth, plain = results
    leaf = hidden.to(runner.device).requires_grad_()
    w, y = weight.to(runner.device), target.to(runner.device)
    row_bytes = load(runner.backend).matmuls(w, leaf.dtype).row_bytes
    plan = uk.Plan(runner.backend, max_chunk_bytes=tokens * row_bytes)
    stats = uk.linear_token_stats(leaf, w, y, readout=uk.Readout(temperature=0.001), plan=plan)
    (found,) = torch.autograd.grad(stats.logp, leaf, upstream.to(runner.device))
    assert not (problems := violations(found.cpu(), plain, truth)), problems
