"""The tensors of a case: values, layouts, fields. Buffers are NaN around what is given."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from tests.fuzz.case import TEMPERATURES, Case
from tests.fuzz.expressions import FIELDS

IGNORED = -100

FACTORS = {
    "normal": (2.0,),
    "wide": (0.01, 0.3, 5.0, 30.0),
    "large": (1e3, 1e4, 1e6),
    "huge": (1e8, 1e15, 1e30),
    "tiny": (1e-7, 1e-30, 1e-44),
}
"""How large logits are."""


@dataclass
class Inputs:
    """What a case gives to the package, and the same flat and in plain lists for the truth.

    Args:
        case: whose they are.
        logits: [B, L, V] or [T, V], or None for a head.
        hidden, weight, bias: [B, L, D] or [T, D], [V, D], [V], of a head.
        target: [B, L] or [T] int64.
        cu_seqlens: of a packed batch.
        offsets: S + 1 numbers, flat positions where sequences begin.
        fields: name -> tensor of shape [], [S] or target's, advantage, old_logp and ref_logp among them.
        of_sequences: names of the fields with a value for each sequence.
        temperature: number, [S] or target's shape.
    """

    case: Case
    target: Tensor
    cu_seqlens: Tensor | None
    offsets: list[int]
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    fields: dict[str, Tensor] = field(default_factory=dict)
    of_sequences: set[str] = field(default_factory=set)
    temperature: float | Tensor = 1.0

    @property
    def n_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def flat_target(self) -> Tensor:
        """[T]."""
        return self.target.reshape(-1)

    @property
    def valid(self) -> Tensor:
        """[T] bool."""
        return self.flat_target != IGNORED

    @property
    def positions(self) -> list[list[int]]:
        """Flat positions that count, for each sequence."""
        counts = self.valid.tolist()
        return [[t for t in range(a, b) if counts[t]] for a, b in itertools.pairwise(self.offsets)]

    @property
    def sequence_of(self) -> Tensor:
        """[T] int64."""
        sizes = torch.tensor([b - a for a, b in itertools.pairwise(self.offsets)])
        return torch.repeat_interleave(torch.arange(self.n_sequences), sizes)

    def per_token(self, name: str) -> Tensor:
        """A field, [T], in its own dtype."""
        value = self.fields[name]
        if name in self.of_sequences:
            return value[self.sequence_of]
        return value.reshape(-1) if value.dim() else value.expand(len(self.flat_target))

    @property
    def interleaved(self) -> bool:
        """Whether chosen and rejected sequences come in turn."""
        return self.case.random("pairs").random() < 0.3

    @property
    def row_temperature(self) -> Tensor:
        """[T] float64; 1 at ignored positions."""
        temperature = self.temperature
        if not isinstance(temperature, Tensor):
            return torch.full(self.flat_target.shape, float(temperature), dtype=torch.float64)
        if temperature.shape != self.target.shape:
            temperature = temperature[self.sequence_of]
        return torch.where(self.valid, temperature.reshape(-1).double(), 1.0)

    @property
    def given(self) -> list[Tensor]:
        """Every tensor that the package gets and must not change."""
        found = [self.logits, self.hidden, self.weight, self.bias, self.target, self.cu_seqlens, self.temperature]
        return [x for x in (*found, *self.fields.values()) if isinstance(x, Tensor)]


def make(case: Case) -> Inputs:
    """The tensors of a case."""
    random = case.random("inputs")
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    inputs = _targets(case, random, generator)
    if case.linear:
        _head(inputs, random, generator)
    else:
        _logits(inputs, random, generator)
    inputs.temperature = _temperature(inputs, random)
    return inputs


def _targets(case: Case, random: Random, generator: torch.Generator) -> Inputs:
    n, longest = len(case.lengths), max(case.lengths)
    shape = (sum(case.lengths),) if case.packed else (n, longest)
    target = torch.randint(0, case.vocab, shape, generator=generator)
    if case.ignored == "some":
        target[torch.rand(shape, generator=generator) < 0.25] = IGNORED
    if case.ignored == "all":
        target.fill_(IGNORED)
    if case.packed:
        offsets = [0, *itertools.accumulate(case.lengths)]
        dtype = random.choice((torch.int32, torch.int64))
        return Inputs(case, strided(target, random), torch.tensor(offsets, dtype=dtype), offsets)
    for row, length in zip(target, case.lengths, strict=True):
        row[length:] = IGNORED
    return Inputs(case, strided(target, random), None, [longest * k for k in range(n + 1)])


def strided(x: Tensor, random: Random) -> Tensor:
    """The same values with other strides, sometimes."""
    how = random.choice(("contiguous", "contiguous", "apart", "turned"))
    if how == "apart" and x.dim():
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    return x.t().contiguous().t() if how == "turned" and x.dim() == 2 else x


def _logits(inputs: Inputs, random: Random, generator: torch.Generator) -> None:
    case = inputs.case
    dtype = getattr(torch, case.dtype)
    x = _values(inputs, random, generator)
    if case.layout != "expanded":  # there a row is all rows
        x[~inputs.valid] = random.choice((0.0, math.nan, math.inf))
    largest = torch.finfo(dtype).max
    x = torch.where(x.isinf(), x, x.clamp(-largest, largest)).to(dtype).reshape(*inputs.target.shape, case.vocab)
    inputs.logits = placed(x, case.layout, random)


def _values(inputs: Inputs, random: Random, generator: torch.Generator) -> Tensor:
    """[T, V] float64: what logits are like."""
    case = inputs.case
    n, vocab = len(inputs.flat_target), case.vocab
    x = torch.randn(n, vocab, dtype=torch.float64, generator=generator)
    column = inputs.flat_target.clamp(min=0).unsqueeze(-1)
    values = case.values
    if values in ("peaked", "certain"):
        low, high = (4, 16) if values == "peaked" else (18, 90)
        bonus = torch.rand(n, 1, dtype=torch.float64, generator=generator) * (high - low) + low
        return x.scatter_add(-1, column, bonus / abs(case.scale))
    if values in ("masked", "masked_target"):
        hidden = torch.rand(n, vocab, generator=generator) < random.choice((0.1, 0.6, 0.95))
        hidden.scatter_(-1, column, values == "masked_target")
        hidden[hidden.all(-1)] = False
        return x.mul_(2).masked_fill_(hidden, -math.inf if case.scale > 0 else math.inf)
    if values == "constant":
        return torch.full_like(x, random.choice((0.0, 1.5, -700.0)))
    if values == "ties":
        return x.round()
    if values == "offset":
        return (4 * x).round() / 4 + random.choice((-1, 1)) * random.choice((300.0, 1e3, 1e4, 2.0**20))
    return x * random.choice(FACTORS[values])


def placed(x: Tensor, layout: str, random: Random) -> Tensor:
    """The same values in another layout; the last dimension stays contiguous."""
    *outer, last = x.shape
    if layout == "padded_rows":
        around = x.new_full((*outer, last + random.randint(1, 9)), math.nan)[..., :last]
    elif layout == "sliced":
        around = x.new_full((*outer[:-1], outer[-1] + 1, last), math.nan).narrow(-2, 0, outer[-1])
    elif layout == "unaligned":
        offset = random.randint(1, 15)
        around = x.new_full((x.numel() + offset,), math.nan)[offset:].view(x.shape)
    elif layout == "transposed":
        turned = (outer[1], outer[0]) if len(outer) == 2 else (2, outer[0])
        around = x.new_full((*turned, last), math.nan)
        around = around.transpose(0, 1) if len(outer) == 2 else around[1]
    elif layout == "expanded" and x.numel():
        return x.reshape(-1, last)[:1].clone().expand(x.shape) if len(outer) == 1 else x[:1].clone().expand(x.shape)
    else:
        return x.contiguous()
    return around.copy_(x)


def _head(inputs: Inputs, random: Random, generator: torch.Generator) -> None:
    """Operands whose logits are like ``case.values``; hidden states of ignored tokens are garbage."""
    case = inputs.case
    dtype = getattr(torch, case.dtype)
    n, vocab, width = len(inputs.flat_target), case.vocab, case.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight, hidden = normal(vocab, width), normal(n, width) / math.sqrt(width)
    if case.values in ("peaked", "certain"):
        sure = 6 if case.values == "peaked" else 30
        hidden += sure / width * weight[inputs.flat_target.clamp(min=0)]
    if case.values == "wide":
        hidden *= 5
    if case.values == "ties":
        weight, hidden = weight.round(), hidden.round()
    if case.values in ("large", "huge"):  # one multiplication each, by a power of two: exact
        largest = math.log2(torch.finfo(dtype).max) - 2
        hidden.zero_()[:, random.randrange(width)] = 2.0 ** min(
            round(math.log2(random.choice(FACTORS[case.values]))), int(largest)
        )
    biased = random.random() < 0.5 and case.values not in ("large", "huge")
    bias = normal(vocab) if biased or case.values in ("offset", "masked") else None
    if bias is not None and case.values == "offset":
        bias += random.choice((-300.0, 100.0, 1000.0))
    if case.layout != "expanded":
        hidden[~inputs.valid] = random.choice((0.0, math.nan, math.inf))
    if bias is not None and case.values == "masked":
        hidden_columns = torch.rand(vocab, generator=generator) < 0.5
        hidden_columns[inputs.flat_target.clamp(min=0)] = False
        bias[hidden_columns] = -math.inf if case.scale > 0 else math.inf
    inputs.hidden = placed(hidden.to(dtype).reshape(*inputs.target.shape, width), case.layout, random)
    inputs.weight = placed(weight.to(dtype), random.choice(("contiguous", "padded_rows", "unaligned")), random)
    inputs.bias = None if bias is None else bias.to(dtype)


def _temperature(inputs: Inputs, random: Random) -> float | Tensor:
    case = inputs.case
    if case.temperature == "number":
        return random.choice(TEMPERATURES)
    whole = not case.level.endswith("loss") and case.packed
    shape = inputs.target.shape if case.temperature == "tokens" or whole else (inputs.n_sequences,)
    count = math.prod(shape)
    values = torch.tensor([random.choice(TEMPERATURES) for _ in range(count)]).reshape(shape)
    if shape == inputs.target.shape:
        values = torch.where(inputs.target == IGNORED, math.nan, values)
    return strided(values, random)


def add_fields(inputs: Inputs, names: set[str], logp: Tensor) -> None:
    """The fields that a loss reads, with garbage at ignored positions.

    Args:
        inputs: gets them.
        names: which.
        logp: [T] float64, about which the other policies' log-probabilities lie.
    """
    random = inputs.case.random("fields")
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    for name in sorted(names):
        inputs.fields[name] = _field(inputs, name, logp, random, generator)


def _field(inputs: Inputs, name: str, logp: Tensor, random: Random, generator: torch.Generator) -> Tensor:
    shape = tuple(inputs.target.shape)
    if name in ("old_logp", "ref_logp"):
        noise = torch.randn(shape, dtype=torch.float64, generator=generator) * random.choice((0.0, 0.05, 0.3))
        value = (logp.reshape(shape).nan_to_num().clamp(min=-60) + noise).float()
        return strided(_garbage(value, inputs, random), random)
    of_sequences = (inputs.n_sequences,)
    shapes = (shape, of_sequences) if name == "advantage" else (shape, of_sequences, ())
    chosen = random.choice(shapes)
    if name in ("per_sequence", "group"):
        chosen = of_sequences
    if chosen == of_sequences != shape:
        inputs.of_sequences.add(name)
    dtype = FIELDS.get(name, torch.int64 if name == "group" else torch.float32)
    if dtype == torch.bool:
        value = torch.rand(chosen, generator=generator) < 0.5
    elif dtype.is_floating_point:
        value = torch.randn(chosen, dtype=torch.float64, generator=generator).to(dtype)
    else:
        value = torch.randint(0, 5, chosen, generator=generator).to(dtype)
    return strided(_garbage(value, inputs, random) if chosen == shape != of_sequences else value, random)


def _garbage(value: Tensor, inputs: Inputs, random: Random) -> Tensor:
    if not value.is_floating_point():
        return value
    return torch.where(inputs.target == IGNORED, random.choice((0.0, math.nan, math.inf)), value)
