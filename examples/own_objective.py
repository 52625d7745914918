"""Your own objective in a training loop of your own: a small recurrent policy learns to count.

Asked with a digit d, it must answer d + 1, d + 2, d + 3 (modulo 10); a sample earns the share of digits that are right.
The objective below is in no library: a clipped surrogate whose upper bound grows with the policy's uncertainty, and an
entropy bonus. The package differentiates it and runs it inside the kernel. Takes seconds on a CPU.

    python examples/own_objective.py [--steps N]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import unirl_kernels as uk

DIGITS, LENGTH, QUESTIONS, GROUP, EPOCHS = 10, 3, 16, 8, 2


def generous_clip(t):  # type: ignore[no-untyped-def]
    """-min(r A, clip(r, 0.8, 1.2 + H/10) A) - H/100: where the policy is unsure, it may move further up."""
    ratio = torch.exp(t.logp - t.old_logp)
    upper = 1.2 + 0.1 * t.entropy.detach()
    bounded = torch.minimum(torch.clamp(ratio, min=0.8), upper)
    return -torch.minimum(ratio * t.advantage, bounded * t.advantage) - 0.01 * t.entropy


class Policy(nn.Module):
    """Predicts the next digit at each place: [B, L] digits -> [B, L, 10] logits."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(DIGITS, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, DIGITS)

    def forward(self, digits: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(digits))[0])

    @torch.no_grad()
    def sample(self, question: Tensor) -> Tensor:
        """[B, 1 + LENGTH]: the question and a sampled answer."""
        digits = question
        for _ in range(LENGTH):
            odds = torch.softmax(self(digits)[:, -1], -1)
            digits = torch.cat([digits, torch.multinomial(odds, 1)], -1)
        return digits


def rewards(digits: Tensor) -> Tensor:
    """[B]: the share of answered digits that are right."""
    right = (digits[:, :1] + torch.arange(1, LENGTH + 1)) % DIGITS
    return (digits[:, 1:] == right).float().mean(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="policy updates")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    loss = uk.Loss(generous_clip, uk.TokenMean())
    print(uk.explain(loss).coefficient, end="\n\n")
    for step in range(1, steps + 1):
        question = torch.randint(0, DIGITS, (QUESTIONS, 1)).repeat_interleave(GROUP, 0)
        digits = policy.sample(question)
        reward = rewards(digits)
        target = uk.shift_targets(digits)
        with torch.no_grad():
            old_logp = uk.token_stats(policy(digits), target).logp
        batch = uk.Batch(target, uk.group_advantages(reward, GROUP), old_logp)
        for _ in range(EPOCHS):
            out = uk.fused_loss(policy(digits), batch, loss, plan=uk.Plan(overwrite_logits=True))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        if step % 10 == 0 or step == steps:
            metrics = "  ".join(f"{name} {value.item():.3f}" for name, value in out.metrics.items())
            print(f"step {step:3d}  reward {reward.mean().item():.3f}  {metrics}")


if __name__ == "__main__":
    main()
