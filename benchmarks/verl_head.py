"""The loss head of verl's actor three ways: ``python -m benchmarks.verl_head --out FILE.json``.

verl's own (``use_fused_kernels`` with ``impl_backend: torch``), ``integrations.verl.patch()`` and
``integrations.verl.fuse(worker)``, on the same micro-batch. The model has no layers: what is measured is the engine's
``forward_step`` and ``backward`` from hidden states on. Rounds are interleaved; memory is of a process for each way.
verl has to be installed, not Ray.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.trainer_heads import run
from benchmarks.verl_engine import ENGINE, LOSSES, Engine, Sampled, loaded

WAYS = ("verl", "patch", "fuse")
PROMPT = 8


class Head:
    """A micro-batch, and the worker whose engine computes its loss.

    Args:
        options: sizes.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        sys.modules.update(loaded())
        implementation: Any = sys.modules[ENGINE]
        implementation.get_device_id = implementation.get_device_name = lambda: "cpu"
        self.model, sampled = _model_and_samples(options)
        importlib.import_module("verl.models.transformers.monkey_patch").patch_forward_with_backends(
            self.model, use_fused_kernels=True, fused_kernels_backend="torch"
        )
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
        self.worker = Engine(implementation, sys.modules[LOSSES]).worker(
            self.model, _config(options.loss), _autocast_dtype=dtype
        )
        tokens = options.sequences * options.length
        flags: dict[str, Any] = {"use_remove_padding": True, "use_fused_kernels": True}
        counts = {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": options.sequences}
        self.micro_batch = sampled.micro_batch(**counts, **flags, temperature=1.0, calculate_entropy=True)

    def step(self, way: str) -> Callable[[], tuple[float, float]]:
        """A call that makes loss and gradient and returns both, the gradient by its norm."""
        from unirl_kernels.integrations import verl

        worker = self.worker

        def call() -> tuple[float, float]:
            if way == "patch":
                verl.patch()
            elif way == "fuse":
                verl.fuse(worker)
            try:
                loss, _ = worker.engine.forward_step(self.micro_batch, loss_function=worker.loss_fn, forward_only=False)
                loss.backward()
            finally:
                verl.unfuse(worker)
                verl.unpatch()
            norm = self.model.lm_head.weight.grad.norm().item()
            self.model.zero_grad(set_to_none=True)
            return loss.item(), norm

        return call


def _config(mode: str) -> Any:
    """An actor's configuration: the policy loss, a penalty and a bonus."""
    actor = importlib.import_module("verl.workers.config.actor")
    policy = actor.PolicyLossConfig(loss_mode=mode, rollout_correction=actor.RolloutCorrectionConfig())
    how = {"use_kl_loss": True, "entropy_coeff": 0.01, "ppo_micro_batch_size_per_gpu": 1}
    return actor.ActorConfig(strategy="fsdp", rollout_n=2, policy_loss=policy, **how)


def _model_and_samples(options: argparse.Namespace) -> tuple[Any, Sampled]:
    """A model, and tokens scored by policies near it."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": options.hidden, "vocab_size": options.vocab}
    config = transformers.LlamaConfig(num_hidden_layers=0, num_attention_heads=1, tie_word_embeddings=False, **sizes)
    model = transformers.LlamaForCausalLM(config).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    ids = torch.randint(options.vocab, (options.sequences, PROMPT + options.length))
    targets = ids[:, PROMPT:]
    with torch.no_grad():
        logits = model(ids).logits[:, PROMPT - 1 : -1]
        logp = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    advantages = torch.randn(options.sequences, 1).expand_as(logp)
    fields = {"response_mask": torch.ones_like(targets), "advantages": advantages}
    fields |= {name: logp + 0.1 * torch.randn_like(logp) for name in ("old_log_probs", "ref_log_prob")}
    return model, Sampled(list(ids[:, :PROMPT]), list(targets), {name: list(x) for name, x in fields.items()})


def main() -> None:
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--loss", default="vanilla", help="actor.policy_loss.loss_mode")

    run("verl_head", __doc__, WAYS, Head, add_options)


if __name__ == "__main__":
    main()
