"""A case: all of its dimensions follow from a seed and a number."""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random

LEVELS = (
    "stats",
    "stats",
    "observations",
    "loss",
    "loss",
    "loss",
    "linear_stats",
    "linear_observations",
    "linear_loss",
)
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
"""Of the native kernels; a process each. The case's number says which."""

VALUES = (
    *("normal", "normal", "normal", "wide", "peaked", "certain", "offset", "large", "huge", "constant", "ties", "tiny"),
    *("masked", "masked", "masked_target"),
)
HEAD_VALUES = ("normal", "normal", "wide", "peaked", "certain", "offset", "masked", "ties", "large", "huge")
"""What logits a linear head gives; large ones come of one multiplication each, since sums of such numbers round
away what tells them apart."""

LAYOUTS = ("contiguous", "contiguous", "padded_rows", "sliced", "unaligned", "transposed", "expanded")
TEMPERATURES = (0.001, 0.01, 0.3, 0.7, 1.0, 1.0, 2.0, 13.0, 100.0)
SIZES = ((1, 9), (1, 9), (10, 40), (10, 70), (10, 70), (71, 300))
LONG = (8189, 8192, 8193, 16385)
"""Around the segment of the native kernels."""


@dataclass(frozen=True)
class Case:
    """One case, without its tensors.

    Args:
        seed, number: where it comes from.
        level: the public function.
        backend, kernel: of the plan.
        dtype: of logits, or of a head's operands.
        lengths: positions of each sequence, some of them ignored.
        packed: whether sequences lie one behind the other, with cu_seqlens.
        vocab, width: V and, for heads, D.
        values: what the logits are like.
        layout: how they lie in memory.
        temperature: "number", "tokens" or "sequences".
        softcap, scale: of the readout.
        ignored: "none", "some" or "all".
        upstream: gradient of the loss.
        chunk: tokens of a head's chunk; 0 for all.
        aspect: what else is asked, see ``properties``.
    """

    seed: int
    number: int
    level: str
    backend: str
    kernel: str | None
    dtype: str
    lengths: tuple[int, ...]
    packed: bool
    vocab: int
    width: int
    values: str
    layout: str
    temperature: str
    softcap: float | None
    scale: float
    ignored: str
    upstream: float
    chunk: int
    aspect: str

    @property
    def name(self) -> str:
        return f"{self.seed}:{self.number}"

    @property
    def linear(self) -> bool:
        return self.level.startswith("linear")

    def random(self, purpose: str) -> Random:
        """Numbers of the case alone; each purpose has its own, so that one can change without the others."""
        return Random(f"{self.name}:{purpose}")

    def __str__(self) -> str:
        named = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name not in ("seed", "number"))
        return ", ".join(named)


def instruction_set(number: int) -> str:
    """The instruction set on which the case of this number runs."""
    return INSTRUCTION_SETS[number % len(INSTRUCTION_SETS)]


def make(seed: int, number: int) -> Case:
    """The case of this number."""
    random = Random(f"{seed}:{number}")
    level = random.choice(LEVELS)
    linear = level.startswith("linear")
    backend, kernel = _place(random, level)
    tiny = backend == "triton"
    vocab, lengths = _sizes(random, tiny, linear)
    return Case(
        seed,
        number,
        level,
        backend,
        kernel,
        dtype=random.choice(("float32", "float32", "float32", "bfloat16", "bfloat16", "float16", "float64")),
        lengths=lengths,
        packed=random.random() < 0.4,
        vocab=vocab,
        width=random.choice((1, 3, 8, 17, 32)),
        values=random.choice(HEAD_VALUES if linear else VALUES),
        layout=random.choice(LAYOUTS),
        temperature=random.choice(("number", "number", "number", "tokens", "sequences")),
        softcap=random.choice((None, None, None, None, 0.5, 5.0, 30.0)),
        scale=random.choice((1.0, 1.0, 1.0, -1.0, -0.3, 0.125, 2.5)),
        ignored=random.choice(("none", "some", "some", "some", "all") if random.random() < 0.5 else ("some",)),
        upstream=random.choice((1.0, 1.0, 1.0, -3.0, 0.37, 1000.0, 0.0)),
        chunk=random.choice((0, 1, 2, 3, 5)),
        aspect=random.choice(("again", "alone", "layouts", "overwrite", "no_grad", "threads", "nothing", "nothing")),
    )


def _place(random: Random, level: str) -> tuple[str, str | None]:
    """Backend and kernel."""
    if random.random() < 0.004:  # interpreted: a row takes 30 ms
        return "triton", random.choice(("two_sweep", "split_row", "composed"))
    backend = random.choice(("cpu", "cpu", "cpu", "cpu", "eager"))
    return backend, random.choice((None, None, "rows", "composed")) if level.endswith("loss") else None


def _sizes(random: Random, tiny: bool, linear: bool) -> tuple[int, tuple[int, ...]]:
    """Vocabulary, and positions of each sequence."""
    if tiny:
        return random.randint(1, 70), (random.randint(1, 3), random.randint(1, 2))
    if random.random() < 0.03:
        return random.choice((1187, 2049) if linear else LONG), random.choice(((2,), (2, 1), (0, 3), (1, 1)))
    low, high = random.choice(SIZES)
    vocab = random.randint(low, high)
    longest = 5 if vocab < 100 else 2
    n = random.choice((1, 2, 2, 3, 4, 4, 6))
    lengths = [random.randint(0, longest) for _ in range(n)]
    if sum(lengths) == n and set(lengths) != {1}:  # a field of [T] could be one of [S], which is refused
        lengths[0] += 1
    return vocab, tuple(lengths)
