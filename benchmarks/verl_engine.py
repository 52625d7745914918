"""verl's engine without Ray: its modules, a worker of the actor, and micro-batches. The bench and the tests run it."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

NEEDLESS = ("ray", "omegaconf", "hydra", "codetiming", "orjson")
"""What verl imports and its engine does not need: where it is not installed, only names are found in it."""

ENGINE, LOSSES = "verl.workers.engine.fsdp.transformer_impl", "verl.workers.utils.losses"


class Absent(ModuleType):
    """A stub for a module from which verl only imports names."""

    MISSING = "???"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (dict,), {})


class Names(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stubs."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in NEEDLESS else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def _ours(name: str) -> bool:
    return name.partition(".")[0] in ("verl", *NEEDLESS)


@functools.cache
def loaded() -> dict[str, ModuleType]:
    """verl's modules by their names, loaded with names alone in the place of ``NEEDLESS``.

    Raises:
        ModuleNotFoundError: when verl is not installed.
    """
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)}
    names = Names()
    sys.meta_path.append(names)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Megatron is not there
            for name in (ENGINE, LOSSES):
                importlib.import_module(name)
        return {name: x for name, x in sys.modules.items() if _ours(name)}
    finally:
        sys.meta_path.remove(names)
        for name in [name for name in sys.modules if _ours(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


class Engine(NamedTuple):
    """verl's modules that a step of the actor runs in."""

    implementation: ModuleType
    losses: ModuleType

    def worker(self, model: Any, config: Any, **options: Any) -> Any:
        """What ``fuse`` takes: an engine on a model, and the loss function."""
        engine = object.__new__(self.implementation.FSDPEngineWithLMHead)
        engine.module, engine.pad_to_length, engine._autocast_dtype = model, False, torch.float32
        engine.use_ulysses_sp, engine.ulysses_sequence_parallel_size = False, 1
        flags = {"entropy_checkpointing": False, "entropy_from_logits_with_chunking": False}
        # As TrainingWorker sets them, of ``actor_rollout_ref.model``.
        flags |= {"use_fused_kernels": True, "use_remove_padding": True}
        engine.engine_config = SimpleNamespace(**{name: options.pop(name, x) for name, x in flags.items()})
        engine.compute_entropy_from_logits = importlib.import_module("verl.utils.torch_functional").entropy_from_logits
        engine.get_data_parallel_group = lambda: None
        vars(engine).update(options)
        return SimpleNamespace(engine=engine, loss_fn=functools.partial(self.losses.ppo_loss, config=config))


class Sampled(NamedTuple):
    """Prompts and responses of a micro-batch, in lists of [n] tensors."""

    prompts: Sequence[Tensor]
    responses: Sequence[Tensor]
    fields: dict[str, Sequence[Tensor]]

    def micro_batch(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """As verl's engine takes it."""
        data = importlib.import_module("verl.utils.tensordict_utils")
        whole = [torch.cat(x) for x in zip(self.prompts, self.responses, strict=True)]
        positions = [torch.arange(len(x)) for x in whole]
        found: dict[str, Any] = {"prompts": self.prompts, "responses": self.responses, "input_ids": whole}
        found |= {"position_ids": positions}
        found |= {name: [x.to(dtype) if x.is_floating_point() else x for x in xs] for name, xs in self.fields.items()}
        tensors = {name: torch.nested.as_nested_tensor(list(xs), layout=torch.jagged) for name, xs in found.items()}
        return data.get_tensordict(tensor_dict=tensors, non_tensor_dict=options)
