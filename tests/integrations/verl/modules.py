"""verl's own modules, and what holds this package's functions against them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from unirl_kernels.integrations import verl as ours
from unirl_kernels.testing.budgets import condition_of, violations

INSTALL = "pip install --no-deps verl==0.9.1 tensordict==0.10.0 'pyvers<0.2' cloudpickle"
V, D = 61, 16
SHAPES = {"removed_padding": (11,), "one_row": (1, 11), "padded": (3, 5)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Verl:
    """verl's modules in which ``patch()`` replaces something."""

    logits: ModuleType
    hidden: ModuleType
    kernel: ModuleType

    @property
    def places(self) -> list[tuple[ModuleType, str]]:
        """What is replaced."""
        of_logits = ("logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking")
        names = {self.logits: of_logits, self.hidden: ("FusedLinearForPPO",), self.kernel: ("linear_cross_entropy",)}
        return [(module, name) for module, found in names.items() for name in found]

    def patched(self) -> list[bool]:
        return [getattr(module, name, None) is getattr(ours, name) for module, name in self.places]


@pytest.fixture
def verl() -> Iterator[Verl]:
    """verl as it is installed, but for what its packages import on top: Ray, servers, configurations."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"verl is not installed: {INSTALL}")
    kept = _take_away()
    root = Path(spec.submodule_search_locations[0])
    for name, folder in (("verl", root), ("verl.utils", root / "utils")):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    names = ("torch_functional", "experimental.torch_functional", "kernel.linear_cross_entropy")
    yield Verl(*(importlib.import_module(f"verl.utils.{name}") for name in names))
    ours.unpatch()
    _take_away()
    sys.modules.update(kept)


def _take_away() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "verl"}


@pytest.fixture
def triton_kernels(verl: Verl, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's Triton kernels, interpreted: without the assertions that tensors are on a GPU."""
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) >= Version("3.9"):
        pytest.skip("the interpreter of Triton 3.9 refuses the masks of verl's kernels, which are integers")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is on where there is no GPU")
    package = importlib.import_module("verl.utils.kernel")
    path = Path(package.__path__[0]) / "kernels.py"
    kernels = ModuleType("verl.utils.kernel.kernels")
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    exec(compile(path.read_text(), path, "exec", dont_inherit=True, optimize=1), vars(kernels))
    monkeypatch.setattr(package, "kernels", kernels, raising=False)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: nullcontext())


def results(function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What a function returns, and the gradients of it all with some upstream gradient."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    returned = function(*leaves)
    values = list(returned) if isinstance(returned, tuple) else [returned]
    upstream = [torch.cos(torch.arange(x.numel())).view(x.shape).to(x) for x in values]
    return [x.detach() for x in (*values, *torch.autograd.grad(values, leaves, upstream))]


def check(
    function: Callable[..., Any],
    theirs: Callable[..., Any],
    tensors: Sequence[Tensor],
    exact: Callable[..., Any] | None = None,
    size: float = 1.0,
) -> None:
    """Assert that values and gradients are within the budget that verl's function sets on the same numbers in float32.

    Args:
        function: ours.
        theirs: verl's.
        tensors: what both are called with.
        exact: verl's in float64, where ``theirs`` computes in float32 whatever it gets.
        size: of the values that results are computed from.
    """
    got = results(function, tensors)
    plain = results(theirs, [x.float() for x in tensors])
    truth = results(exact or theirs, [x.double() for x in tensors])
    for i, (x, p, t) in enumerate(zip(got, plain, truth, strict=True)):
        of_values = i < len(got) - len(tensors)
        assert x.dtype == (torch.float32 if of_values else tensors[i - len(got)].dtype)
        assert x.shape == p.shape
        # A gradient of 16 bits is rounded once, at the end.
        how = {"condition": condition_of(t, size)} if x.dtype == torch.float32 else {"ulps": 1.0}
        assert not (problems := violations(x, p.to(x.dtype), t, **how)), f"{i}: {problems}"
