"""verl's own losses: the modules that define them, without what their packages import on top."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.verl_engine import Absent
from tests.integrations.verl.modules import INSTALL

PACKAGES = ("workers", "workers/config", "workers/utils", "trainer", "trainer/ppo")
AROUND = (
    *("workers.config.checkpoint", "workers.config.engine", "workers.config.model", "workers.config.optimizer"),
    *("utils.profiler", "utils.profiler.config", "utils.qat", "utils.dataset", "utils.dataset.dataset_utils"),
    *("utils.tensordict_utils", "workers.utils.padding"),
)
"""What no loss needs: engines, models, profilers."""


@functools.cache
def _loaded() -> dict[str, ModuleType]:
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"verl is not installed: {INSTALL}")
    root = Path(spec.submodule_search_locations[0])
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "verl"}
    try:
        for folder in ("", *PACKAGES):
            name = ".".join(["verl", *filter(None, folder.split("/"))])
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(root / folder)]
        if importlib.util.find_spec("omegaconf") is None:
            sys.modules["omegaconf"] = Absent("omegaconf")
        for name in AROUND:
            sys.modules[f"verl.{name}"] = Absent(f"verl.{name}")
            sys.modules[f"verl.{name}"].__path__ = []
        sys.modules["verl.workers.utils.padding"].no_padding_2_padding = lambda x, data: x  # type: ignore[attr-defined]
        protocol = ModuleType("verl.protocol")
        protocol.DataProto = Wrapped  # type: ignore[attr-defined]
        sys.modules["verl.protocol"] = protocol
        configs = sys.modules["verl.workers.config"]
        vars(configs).update(vars(importlib.import_module("verl.workers.config.actor")))
        configs.CriticConfig = dict  # type: ignore[attr-defined]
        for name in ("trainer.ppo.core_algos", "trainer.ppo.rollout_corr_helper", "workers.utils.losses"):
            importlib.import_module(f"verl.{name}")
        return {name: x for name, x in sys.modules.items() if name.partition(".")[0] in ("verl", "omegaconf")}
    finally:
        for name in list(sys.modules):
            if name.partition(".")[0] in ("verl", "omegaconf") and name not in kept:
                del sys.modules[name]
        sys.modules.update(kept)


class Wrapped:
    """verl's DataProto, as far as losses use it."""

    @staticmethod
    def from_dict(tensors: dict[str, Any]) -> Any:
        return SimpleNamespace(batch=tensors)


class Data(dict[str, Any]):
    """A micro-batch, padded."""

    def select(self, *names: str) -> Data:
        return Data({name: self[name] for name in names})

    def to_padded_tensor(self) -> Data:
        return self


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """verl.workers.utils.losses."""
    for name, module in _loaded().items():
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["verl.workers.utils.losses"]
