"""OpenRLHF's actor, with or without flash-attn."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import peft  # noqa: F401, before anything that looks like flash-attn is there
from transformers import LlamaForCausalLM  # noqa: F401


def _with_padding_of_flash_attention() -> ModuleType:
    """The actor, which imports what it needs for packed samples alone from flash-attn; that installs with CUDA only."""
    names = {"flash_attn": (), "flash_attn.utils": (), "flash_attn.utils.distributed": ("all_gather",)}
    names["flash_attn.bert_padding"] = ("index_first_axis", "pad_input", "rearrange", "unpad_input")
    for name, functions in names.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(functions))
    try:
        return importlib.import_module("openrlhf.models.actor")
    finally:
        for name in names:
            del sys.modules[name]


with_flash_attention = importlib.util.find_spec("flash_attn") is not None
actors: Any = (
    importlib.import_module("openrlhf.models.actor") if with_flash_attention else _with_padding_of_flash_attention()
)
PolicyLoss: Any = importlib.import_module("openrlhf.models.loss").PolicyLoss
compute_approx_kl: Any = importlib.import_module("openrlhf.models.utils").compute_approx_kl
