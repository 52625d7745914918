"""The demo from beginning to end."""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import unirl_kernels as uk
from benchmarks.arguments import usable_device
from benchmarks.terminal import Stages, open_console
from examples.demo.compare import Row, compare, steps_per_comparison
from examples.demo.computations import on_hidden, on_logits
from examples.demo.head import LinearHead
from examples.demo.model import LanguageModel, Location, load_model, load_tokenizer, locate
from examples.demo.picture import save_picture
from examples.demo.questions import Question, Questions
from examples.demo.report import GrpoStep, Result, save_summary, tables
from examples.demo.sampling import Sampler, Samples
from examples.demo.sources import (
    Degenerate,
    Source,
    accepted_samples,
    accepted_samples_of_policy,
    best_worst_pairs,
    gold_answers,
    groups,
    samples_with_advantages,
)
from examples.demo.train import Step, optimise, passes
from unirl_kernels import backends
from unirl_kernels.commands.cli import CommandFailed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP_STEPS = 2
LINEAR_ROUNDS, LINEAR_PEAKS = 2, 1
"""At most so many runs of a loss on hidden states: each takes seconds, so the overhead of a first run is small."""


def run_demo(options: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        The exit code: 0 when every error lies within its tolerance.

    Raises:
        CommandFailed: when something that it needs cannot be had.
    """
    device = usable_device(options.device)
    plan = uk.Plan(_backend(device, options.backend))
    out = _writable(options.out)
    location = locate(options.model)
    console = open_console()
    try:
        demo = Demo(options, device, plan, location, Stages(console))
        rows, linear_rows = demo.compare_all()
        steps = list(demo.grpo_steps())
        result = Result(location.name, demo.vocab, demo.width, plan.backend or "", rows, linear_rows, steps)
    except Degenerate as error:
        raise CommandFailed(f"{error}; try another --seed, more --questions or a larger --group") from error
    except torch.OutOfMemoryError as error:
        raise CommandFailed(f"{device} is out of memory; try fewer --questions or a smaller --group") from error
    out.mkdir(parents=True, exist_ok=True)
    with demo.stages.stage("Drawing the picture"):
        save_picture(result, out / "demo.png")
        save_summary(result, out / "summary.json")
    console.print()
    for shown in tables(result, console.width):
        console.print(shown)
        console.print()
    console.print(f"Saved {out / 'demo.png'} and {out / 'summary.json'}", highlight=False, soft_wrap=True)
    if exceeded := result.exceeded():
        raise CommandFailed("; ".join(exceeded))
    return 0


def _backend(device: torch.device, name: str | None) -> str:
    try:
        return backends.choose(device, name, None).backend
    except (ValueError, RuntimeError) as error:
        raise CommandFailed(f"--backend {name}: {error}") from error


def _writable(out: Path) -> Path:
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        for folder in missing:  # a demo that fails leaves none behind
            folder.rmdir()
    except OSError as error:
        raise CommandFailed(f"cannot write to --out {out}: {error.strerror}") from error
    return out


class Demo:
    """The policy, the frozen model it started from, and what they are trained and compared on.

    Args:
        options: of the command line, see ``options``.
        device: where everything computes.
        plan: how the fused losses are computed.
        location: of the model.
        stages: shows progress.
    """

    def __init__(
        self, options: argparse.Namespace, device: torch.device, plan: uk.Plan, location: Location, stages: Stages
    ) -> None:
        self.options, self.plan, self.stages = options, plan, stages
        torch.manual_seed(options.seed)
        with stages.stage(f"Loading the tokenizer of {location.name}"):
            tokenizer = load_tokenizer(location)
        start = time.perf_counter()
        self.policy = load_model(location, device, DTYPES[options.dtype])  # shows its own progress
        stages.done(f"Loading the model {location.name}", time.perf_counter() - start)
        frozen = copy.deepcopy(self.policy.network).requires_grad_(False)
        self.frozen = replace(self.policy, network=frozen)
        if self.policy.obstacle:
            stages.console.print(
                f"  {location.name} is trained on all its logits: {self.policy.obstacle}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        self.questions = Questions(options.seed)
        generator = torch.Generator(device).manual_seed(options.seed)
        self.sampler = Sampler(tokenizer, self.questions, options.group, options.max_new_tokens, generator)
        self.optimizer = torch.optim.AdamW(self.policy.network.parameters(), lr=options.learning_rate, weight_decay=0.0)

    @property
    def vocab(self) -> int:
        return int(self.policy.network.get_output_embeddings().weight.shape[0])

    @property
    def width(self) -> int:
        return int(self.policy.network.get_output_embeddings().weight.shape[1])

    def compare_all(self) -> tuple[list[Row], list[Row]]:
        """The six rows of each table: losses on logits and, where the model's head allows it, on hidden states."""
        rows, linear_rows = [], []
        for source in self._sources():
            rows.append(self._compare(source))
            if self.policy.head is not None:
                linear_rows.append(self._compare_linear(source, self.policy.head))
        return rows, linear_rows

    def _sources(self) -> Iterator[Source]:
        """The data of the six algorithms, each made while the policy is the one that the table names."""
        drawn = self.questions.draw(self.options.questions)
        gold = self.sampler.gold(self.policy, drawn)
        sft = gold_answers(gold)
        frozen = self._sample(self.frozen, "frozen model", drawn)
        self._train("Warming the policy up on gold answers", [sft] * WARM_UP_STEPS)
        policy = self._sample(self.policy, "policy", drawn)
        (frozen_ref,) = self._log_probs("reference policy on frozen samples", (self.frozen, frozen))
        old, ref = self._log_probs("old and reference policy", (self.policy, policy), (self.frozen, policy))
        dpo = best_worst_pairs(frozen, frozen_ref)
        yield from (sft, accepted_samples(frozen), accepted_samples_of_policy(policy), dpo)
        # As in a second epoch on the same samples: the policy is no longer the one that drew them.
        grpo = groups(policy, old, ref)
        self._train("Moving the policy away from its samples", [grpo])
        yield from (samples_with_advantages(policy, old, ref), grpo)

    def grpo_steps(self) -> Iterator[GrpoStep]:
        """GRPO on new questions: sample, score, and make a step."""
        for n in range(1, self.options.steps + 1):
            samples = self._sample(self.policy, f"policy, GRPO step {n}", self.questions.draw(self.options.questions))
            models = ((self.policy, samples), (self.frozen, samples))
            source = groups(samples, *self._log_probs("old and reference policy", *models))
            (step,) = self._train(f"GRPO step {n}", [source])
            done = GrpoStep(float(samples.verdicts.mean()), step)
            self.stages.console.print(
                f"  GRPO step {n}: loss {step.loss:+.5f}  reward {done.reward:.3f}  kl {step.metrics['kl']:.5f}  "
                f"entropy {step.metrics['entropy']:.3f}  grad-norm {step.grad_norm:.2f}"
            )
            yield done

    def _sample(self, model: LanguageModel, whose: str, drawn: Sequence[Question]) -> Samples:
        with self.stages.stage(f"Sampling: {whose}", self.options.max_new_tokens) as after_token:
            samples = self.sampler.samples(model, drawn, after_token)
        accepted, right = int(samples.verdicts.sum()), samples.verdicts.view(-1, samples.group).mean(-1)
        mixed = int(((right > 0) & (right < 1)).sum())
        self.stages.console.print(
            f"  {accepted} of {len(samples.verdicts)} accepted; {mixed} of {len(right)} groups hold both; "
            f"the first to {drawn[0].text!r}: {samples.texts[0]!r}",
            markup=False,
            style="dim",
            highlight=False,
        )
        return samples

    def _log_probs(self, whose: str, *pairs: tuple[LanguageModel, Samples]) -> list[torch.Tensor]:
        with self.stages.stage(f"Log-probabilities: {whose}", len(pairs)) as after_model:
            found = []
            for model, samples in pairs:
                found.append(model.log_probs(samples.sequences, self.plan))
                after_model()
        return found

    def _train(self, title: str, sources: Sequence[Source]) -> list[Step]:
        with self.stages.stage(title, sum(passes(source.batch) for source in sources)) as after_pass:
            return [
                optimise(
                    self.policy,
                    self.optimizer,
                    source.sequences,
                    source.batch,
                    source.loss,
                    plan=self.plan,
                    after_pass=after_pass,
                )
                for source in sources
            ]

    def _compare(self, source: Source) -> Row:
        rounds = self.options.rounds
        with self.stages.stage(f"Comparing: {source.algorithm}", 1 + steps_per_comparison(rounds)) as after_step:
            with torch.no_grad():
                logits = self.policy.logits(source.sequences)
            after_step()
            return compare(source, on_logits(source, logits, self.plan), self.plan, rounds, after_step)

    def _compare_linear(self, source: Source, head: LinearHead) -> Row:
        rounds = min(LINEAR_ROUNDS, self.options.rounds)
        title = f"Comparing on hidden states: {source.algorithm}"
        with self.stages.stage(title, 1 + steps_per_comparison(rounds)) as after_step:
            with torch.no_grad():
                hidden = self.policy.hidden(source.sequences)
            after_step()
            computations = on_hidden(source, hidden, head, self.plan)
            return compare(source, computations, self.plan, rounds, after_step, peaks=LINEAR_PEAKS)
