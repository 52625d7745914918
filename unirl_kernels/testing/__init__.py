"""Check your own objective or kernel: an oracle, and budgets for errors. Imports only torch.

oracle      the published equations, written naively, in the dtype of the logits: in fp64 they are the truth
budgets     how large an error may be: computed from the error of eager PyTorch, never chosen

A kernel that computes log-probabilities is right if nothing exceeds the budget:

>>> import torch
>>> from unirl_kernels.testing import budgets, oracle
>>> logits, target = torch.randn(2, 8, 1000), torch.randint(1000, (2, 8))
>>> mine = logits.gather(-1, target[..., None])[..., 0] - logits.logsumexp(-1)
>>> truth, plain = oracle.log_probs(logits.double(), target), oracle.log_probs(logits, target)
>>> condition = budgets.condition_of(truth, scale=logits.logsumexp(-1).abs().max().item())
>>> budgets.violations(mine, plain, truth, condition=condition)
[]
"""
