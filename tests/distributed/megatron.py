"""verl's functions of Megatron's split vocabularies; run by ``tests/distributed/shards.py``.

Megatron need not be installed: of it verl's functions of logits ask for the group alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.split import same_bits
from unirl_kernels.integrations import verl
from unirl_kernels.integrations.verl import megatron
from unirl_kernels.testing import oracle

V, D, SHAPE = 64, 12, (3, 7)


@contextmanager
def loaded(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Insert modules that are not installed. Modules that they import stay loaded."""
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def with_group() -> dict[str, ModuleType]:
    """Modules that give the group of all ranks."""
    names = ("megatron", "megatron.core", "megatron.core.parallel_state")
    modules = {name: ModuleType(name) for name in names}
    state = modules["megatron.core.parallel_state"]
    state.get_tensor_model_parallel_group = lambda: dist.group.WORLD  # type: ignore[attr-defined]
    modules["megatron.core"].parallel_state = state  # type: ignore[attr-defined]
    return modules


def verls_entropy(logits: Tensor) -> Tensor | None:
    """verl's own, without the packages around it and without compiling; None where verl is not installed."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    packages = {name: ModuleType(name) for name in ("verl", "verl.utils", "verl.utils.megatron")}
    for name, module in packages.items():
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    with loaded(packages), mock.patch("torch.compile", return_value=lambda function: function):
        theirs = importlib.import_module("verl.utils.megatron.tensor_parallel")
        found: Tensor = theirs.vocab_parallel_entropy(logits)
    return found


def check_logits() -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(*SHAPE, V, dtype=torch.float64)).requires_grad_()
    labels, weight = torch.randint(0, V, SHAPE), torch.randn(2, *SHAPE, dtype=torch.float64)
    logp, entropy = oracle.log_probs(x, labels), oracle.entropy(x)
    (weight[0] * logp + weight[1] * entropy).sum().backward()
    assert x.grad is not None
    rank, world = dist.get_rank(), dist.get_world_size()
    own = x.detach().chunk(world, -1)[rank].clone().requires_grad_()
    found = megatron.vocab_parallel_log_probs_from_logits(own, labels), megatron.vocab_parallel_entropy(own)
    torch.testing.assert_close(found, (logp.detach(), entropy.detach()))
    assert all(same_bits(f.detach()) for f in found)
    (weight[0] * found[0] + weight[1] * found[1]).sum().backward()
    torch.testing.assert_close(own.grad, x.grad.chunk(world, -1)[rank])
    chunked = megatron.vocab_parallel_entropy_with_chunking(own.detach(), chunk_size=2)
    assert torch.equal(chunked, found[1])
    theirs = verls_entropy(own.detach().clone())
    assert theirs is None or torch.allclose(theirs, entropy)


def check_head() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(*SHAPE, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    labels = torch.randint(0, V, SHAPE)
    rank, world = dist.get_rank(), dist.get_world_size()

    def run(h: Tensor, w: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        logp, entropy = verl.linear_cross_entropy(h, w, labels, 0.7, "none", group)
        d_hidden, d_weight = torch.autograd.grad((logp - 0.1 * entropy**2).sum(), (h, w))
        return logp.detach(), entropy.detach(), d_hidden, d_weight

    whole = run(hidden, weight, None)
    *found, d_hidden, d_weight = run(hidden, weight.chunk(world)[rank], dist.group.WORLD)
    dist.all_reduce(d_hidden)  # what Megatron's region does
    torch.testing.assert_close((*found, d_hidden), whole[:3])
    torch.testing.assert_close(d_weight, whole[3].chunk(world)[rank])


def check_all() -> None:
    with loaded(with_group()):
        check_logits()
    check_head()
