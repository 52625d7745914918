"""What a loss is computed on: targets, advantages, and log-probabilities of the old and reference policies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from unirl_kernels.checks import (
    check_device,
    check_dtype,
    check_layout,
    check_memory,
    check_target,
    has_values,
    name_of,
    readable,
)
from unirl_kernels.ranks.collectives import Group, all_gather, group_of
from unirl_kernels.ranks.split_sequences import agree, refuse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IGNORE = -100
"""Target of a token that is not part of the loss: prompt, padding, tool output. There is no other mask."""


FIELDS = ("advantage", "old_logp", "ref_logp")
"""Fields that are arguments of ``Batch``."""

OF_TOKENS = ("old_logp", "ref_logp")
"""Those that always have a value per token."""

RESERVED = frozenset(
    {
        *("logp", "entropy", "lse", "valid", "lengths", "positions", "n_sequences", "n_pairs"),
        *("to_tokens", "sequence_field", "sequence_sum", "sequence_mean", "sequence_scan"),
        *("pairs", "same_group", "group_sum", "group_mean"),
    }
)
"""Attributes of ``Tokens`` that are not fields. A field cannot have one of these names."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of tokens to learn from, padded or packed.

    In the padded layout ``target`` is [B, L] and each row is a sequence (S = B). In the packed layout ``target`` is [T]
    and sequence s holds the tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``.

    Fields may have any real, integer or bool dtype. One-pass kernels round float64 fields to float32, unless the logits
    are float64. The shape of a field tells whether it has a value per sequence or per token, unless ``sequence_fields``
    is given.

    Args:
        target: [B, L] or [T] int64, the token that the logits at this position predict, in [0, V), or ``IGNORE``.
        advantage: [S] or target's shape: the advantage of a sequence or token; for RFT the verdict I(o) in {0, 1}.
        old_logp: target's shape, <= 0: log-probabilities under the policy that sampled. None: on policy. The ratio is
            then 1, and its gradient is that of logp.
        ref_logp: target's shape, <= 0: log-probabilities under the reference policy.
        cu_seqlens: [S + 1] int32 or int64, cumulative lengths from 0 to T; for the packed layout only.
        fields: name -> tensor of shape [], [S] or target's; an objective reads it as ``t.<name>``.
        pairs: where losses of pairs (DPO) find them. ``"halves"``: the first S/2 sequences are the chosen ones, the
            others are the rejected ones in the same order. ``"interleaved"``: chosen and rejected in turn.
        sequence_group: process group over which each sequence is split (context parallelism); None: sequences are
            whole. The batch of each rank holds a part of every sequence, in the order of ranks, and the values per
            sequence. Lengths and sums over sequences are those of whole sequences. The loss of the step is the sum of
            the ranks' losses. The ranks communicate when a batch is made, and when losses or metrics of sequences or
            pairs are computed: all ranks must make the same calls.
        sequence_fields: names of the fields with a value per sequence, ``advantage`` included; all others have a value
            per token, or one for all. None: the shapes tell. They cannot if a packed batch has as many tokens as
            sequences, some of them empty, or any of them in compiled code.

    Raises:
        TypeError: when an argument is not a tensor or has a wrong dtype, ``fields`` is not a mapping, or
            ``sequence_fields`` is a string.
        ValueError: when a shape, a device, a field's name, ``pairs``, the cumulative lengths or ``sequence_fields`` do
            not fit, or a field could have a value per sequence or per token.

    Examples:
        Two sequences of two and one tokens, padded and packed:

        >>> advantage = torch.tensor([1.0, -1.0])
        >>> padded = uk.Batch(torch.tensor([[5, 7], [8, uk.IGNORE]]), advantage)
        >>> packed = uk.Batch(torch.tensor([5, 7, 8]), advantage, cu_seqlens=torch.tensor([0, 2, 3]))
        >>> padded.lengths, packed.lengths
        (tensor([2, 1]), tensor([2, 1]))
    """

    target: Tensor  # [B, L] or [T]
    advantage: Tensor | None = None  # [S] or target's shape
    old_logp: Tensor | None = None  # target's shape
    ref_logp: Tensor | None = None  # target's shape
    cu_seqlens: Tensor | None = None  # [S + 1]
    fields: Mapping[str, Tensor] = field(default_factory=dict)  # [], [S] or target's shape each
    pairs: Literal["halves", "interleaved"] = "halves"
    sequence_group: ProcessGroup | None = None
    sequence_fields: Collection[str] | None = None
    # Names of fields with a value per sequence. Not a field of the dataclass, so that dataclasses.replace computes it
    # again.
    _of_sequences: ClassVar[frozenset[str]] = frozenset()
    _one_token_each: ClassVar[bool] = False
    # Of a split sequence: the ranks, and the valid tokens of each sequence on each of them, [n, S].
    ranks: ClassVar[Group | None] = None
    _lengths: ClassVar[Tensor | None] = None

    def __post_init__(self) -> None:
        if isinstance(self.fields, Mapping):  # a caller may change the mapping for the next batch
            object.__setattr__(self, "fields", dict(self.fields))
        if self.sequence_group is None:
            self._check()
        else:
            self._join(group_of("sequence_group", self.sequence_group))

    def _join(self, ranks: Group) -> None:
        """Check the batch, and exchange the lengths of its sequences with the other ranks."""
        on_cpu = not isinstance(self.target, Tensor) or readable(self.target)
        try:
            self._check()
        except Exception:
            if on_cpu:
                refuse(ranks)
            raise
        readings = {name: self._reading(name, x) for name, x in self.given().items() if name not in OF_TOKENS}
        if on_cpu:
            spread = self._of_sequences | agree(self.n_sequences, readings, ranks)
            object.__setattr__(self, "_of_sequences", spread)
        else:
            self._refuse_ambiguous(readings)
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "_lengths", all_gather(self.own_lengths, ranks))

    def _check(self) -> None:
        check_target(self.target)
        shape = tuple(self.target.shape)
        if len(shape) == 1:
            self._check_packed()
        elif self.cu_seqlens is not None:
            hint = "; give target.reshape(-1)" if shape[0] == 1 else ""
            raise ValueError(f"cu_seqlens is for packed targets of shape [T]; target has shape {shape}{hint}")
        if self.pairs not in ("halves", "interleaved"):
            raise ValueError(f"pairs must be 'halves' or 'interleaved', got {self.pairs!r}")
        self._check_fields()

    def _check_fields(self) -> None:
        if not isinstance(self.fields, Mapping):
            raise TypeError(f"fields must map names to tensors, got {type(self.fields).__name__}")
        for name in self.fields:
            if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
                raise ValueError(f"fields must have names that are identifiers and do not start with _, got {name!r}")
            if name in RESERVED or name in FIELDS:
                what = "an argument of Batch" if name in FIELDS else "an attribute of the tokens"
                raise ValueError(f"fields must not use a name that is taken, got {name!r}, {what}")
        self._check_sequence_fields()
        if self.sequence_fields is None:
            object.__setattr__(self, "_one_token_each", self._has_one_token_each())
        for name in FIELDS:
            if (value := getattr(self, name)) is not None:
                self._check_field(name, value, self._shapes(name))
                if value.requires_grad:
                    raise ValueError(f"{name} must not require a gradient (gradients flow to the logits): detach it")
        for name, value in self.fields.items():
            self._check_field(f"fields[{name!r}]", value, ((), *self._shapes(name)))
        readings = {name: self._reading(name, x) for name, x in self.given().items()}
        if self.sequence_group is None:
            self._refuse_ambiguous(readings)
        spread = {name for name, reading in readings.items() if reading == "sequence"}
        object.__setattr__(self, "_of_sequences", frozenset(spread))

    def _check_sequence_fields(self) -> None:
        names = self.sequence_fields
        if names is None:
            return
        if isinstance(names, str) or not isinstance(names, Collection):
            got = f"the string {names!r}" if isinstance(names, str) else type(names).__name__
            raise TypeError(f"sequence_fields must be a collection of names, got {got}")
        allowed = [*self.fields] if self.advantage is None else ["advantage", *self.fields]
        for name in names:
            if name not in allowed:
                raise ValueError(f"sequence_fields must name fields of this batch, {allowed}, got {name!r}")
        object.__setattr__(self, "sequence_fields", frozenset(names))

    def _shapes(self, name: str) -> tuple[tuple[int, ...], ...]:
        """The shapes that a field with more than one value may have."""
        of_sequences, of_tokens = (self.n_sequences,), tuple(self.target.shape)
        if name in OF_TOKENS:
            return (of_tokens,)
        if self.sequence_fields is None:
            return of_sequences, of_tokens
        return (of_sequences if name in self.sequence_fields else of_tokens,)

    def given(self) -> dict[str, Tensor]:
        """The fields that are not None."""
        values = {name: getattr(self, name) for name in FIELDS} | dict(self.fields)
        return {name: x for name, x in values.items() if x is not None}

    def _reading(self, name: str, x: Tensor) -> str:
        """What a field has one value for: ``sequence``, ``token`` or ``all``.

        Without ``sequence_fields``, and with as many sequences as tokens: ``same`` if each sequence has one token, else
        ``either``.
        """
        if not x.dim():
            return "all"
        if name in OF_TOKENS:
            return "token"
        if self.sequence_fields is not None:
            return "sequence" if name in self.sequence_fields else "token"
        of_sequences, of_tokens = self._shapes(name)
        if of_sequences == of_tokens:
            return "same" if self._one_token_each else "either"
        return "sequence" if tuple(x.shape) == of_sequences else "token"

    @property
    def shapes_tell(self) -> bool:
        """Whether shapes tell a value per sequence from one per token, or the two are the same."""
        if tuple(self.target.shape) != (self.n_sequences,) or self._one_token_each:
            return True
        return self._has_one_token_each()

    def _has_one_token_each(self) -> bool:
        """Whether each sequence of a packed batch with as many tokens as sequences has one token. Waits for an
        accelerator. In compiled code, which cannot decide by values: False."""
        ends = self.cu_seqlens
        if torch.compiler.is_compiling() or ends is None or tuple(self.target.shape) != (self.n_sequences,):
            return False
        return not has_values(ends) or not bool((ends.diff() != 1).any())

    def _refuse_ambiguous(self, readings: Mapping[str, str]) -> None:
        which = "in compiled code" if torch.compiler.is_compiling() else "some of them empty"
        for name, reading in readings.items():
            if reading == "either":
                raise ValueError(
                    f"{name} is ambiguous: target has {self.n_sequences} tokens in as many sequences, {which}; name "
                    "the fields with a value per sequence: sequence_fields=[...]"
                )

    def _check_field(self, name: str, value: object, shapes: Sequence[tuple[int, ...]]) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        check_layout(name, value)
        check_memory(name, value)
        if value.dtype.is_complex:
            raise TypeError(f"{name} must be real, integer or bool, got {name_of(value.dtype)}")
        if value.dtype.is_floating_point and value.dtype.itemsize < 2:
            raise TypeError(
                f"{name} must be real, integer or bool, of at least 16 bits if floating-point, got "
                f"{name_of(value.dtype)}"
            )
        if tuple(value.shape) not in shapes:
            expected = " or ".join(dict.fromkeys(map(str, shapes)))
            raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
        check_device(name, value, self.target.device, "target")

    def _check_packed(self) -> None:
        if self.cu_seqlens is None:
            raise ValueError(f"cu_seqlens must be given for a packed target of shape {tuple(self.target.shape)}")
        check_dtype("cu_seqlens", self.cu_seqlens, torch.int32, torch.int64)
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() < 2:
            raise ValueError(f"cu_seqlens must have shape [S + 1], S >= 1, got {tuple(self.cu_seqlens.shape)}")
        check_device("cu_seqlens", self.cu_seqlens, self.target.device, "target")
        if readable(self.cu_seqlens):
            ends = self.cu_seqlens
            if ends[0] != 0 or ends[-1] != self.target.numel() or bool((ends.diff() < 0).any()):
                raise ValueError(
                    f"cu_seqlens must rise from 0 to {self.target.numel()} (the tokens of target), got {ends.tolist()}"
                )

    @property
    def n_sequences(self) -> int:
        return self.target.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def n_pairs(self) -> int:
        """S / 2, for losses of pairs.

        Raises:
            ValueError: when the number of sequences is odd.
        """
        if self.n_sequences % 2:
            raise ValueError(
                f"target must hold an even number of sequences, chosen and rejected, got {self.n_sequences}"
            )
        return self.n_sequences // 2

    def split_pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split one value per sequence, [S], into the chosen and the rejected ones, [S/2] each."""
        n = self.n_pairs
        return (x[:n], x[n:]) if self.pairs == "halves" else (x[::2], x[1::2])

    @property
    def offsets(self) -> Tensor:
        """[S + 1] int64, rising, in [0, T]: sequence s holds the flat tokens offsets[s] to offsets[s + 1]."""
        if self.cu_seqlens is not None:
            # On a GPU the values were not checked: clamp them, so that no index leaves the tensors.
            return self.cu_seqlens.to(torch.int64).clamp(0, self.target.numel()).cummax(0).values
        n, length = self.target.shape
        return torch.arange(n + 1, device=self.target.device) * length

    @property
    def valid(self) -> Tensor:
        """Target's shape, bool: the tokens that count."""
        return self.target != IGNORE

    @property
    def lengths(self) -> Tensor:
        """[S] int64: |o|, the number of valid tokens of each sequence, on all ranks that have a part of it."""
        return self.own_lengths if self._lengths is None else self._lengths.sum(0)

    @property
    def lengths_before(self) -> Tensor | None:
        """[S] int64: valid tokens of each sequence on the ranks before this one; None where sequences are whole."""
        return None if self._lengths is None or self.ranks is None else self._lengths[: self.ranks.rank].sum(0)

    @property
    def n_tokens(self) -> Tensor:
        """0-dim int64: valid tokens of all sequences."""
        return self.valid.sum() if self._lengths is None else self._lengths.sum()

    @property
    def own_lengths(self) -> Tensor:
        """[S] int64: the number of valid tokens of each sequence in this batch."""
        if self.cu_seqlens is None:
            return self.valid.sum(-1)
        before = torch.nn.functional.pad(self.valid.cumsum(0), (1, 0))
        return before[self.offsets].diff()

    def per_token(self, x: Tensor) -> Tensor:
        """Spread one value per sequence, [S], over the sequences' tokens: target's shape."""
        if self.cu_seqlens is None:
            return x.unsqueeze(-1).expand(self.target.shape)
        return x[self.sequence_of_token]

    @property
    def sequence_of_token(self) -> Tensor:
        """[T] int64: the sequence that each flat token belongs to."""
        positions = torch.arange(self.target.numel(), device=self.target.device)
        return torch.searchsorted(self.offsets[1:-1], positions, right=True)

    @property
    def on_policy(self) -> bool:
        return self.old_logp is None

    def get(self, name: str) -> Tensor:
        """The field as it was given.

        Raises:
            ValueError: when the batch lacks it.
        """
        value: Tensor | None = getattr(self, name) if name in FIELDS else self.fields.get(name)
        if value is None:
            given = f"batch.{name} is None" if name in FIELDS else f"batch.fields has {sorted(self.fields) or 'none'}"
            raise ValueError(f"the objective reads t.{name}, but {given}")
        return value

    def per_token_field(self, name: str) -> Tensor:
        """A field in target's shape, spread where it has a value per sequence or one for all."""
        value = self.get(name)
        if name in self._of_sequences:
            return self.per_token(value)
        return value if value.dim() else value.expand(self.target.shape)

    def per_sequence_field(self, name: str) -> Tensor:
        """A field that has a value per sequence, or one for all: [S].

        Raises:
            ValueError: when the batch lacks it, or it has a value per token.
        """
        value, shape = self.get(name), (self.n_sequences,)
        if value.dim() and tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        # If every sequence has one token, a value per token is a value per sequence.
        if value.dim() and name not in self._of_sequences and not self._one_token_each:
            raise ValueError(f"{name} must have a value per sequence, got one per token")
        return value.expand(shape)

    def sequences(self, chosen: Tensor) -> Batch:
        """The chosen sequences as a packed batch, in the given order.

        Args:
            chosen: [n] int64.
        """
        positions, ends = self.positions_of(chosen)
        fields = {name: self._taken(name, chosen, positions) for name in self.given()}
        part = object.__new__(Batch)
        vars(part).update({name: fields.pop(name, None) for name in FIELDS})
        vars(part).update(target=self.target.reshape(-1)[positions], cu_seqlens=ends, fields=fields, pairs=self.pairs)
        vars(part).update(sequence_fields=self._of_sequences, _of_sequences=self._of_sequences)
        vars(part).update(_one_token_each=self._one_token_each)
        return part

    def _taken(self, name: str, sequences: Tensor, positions: Tensor) -> Tensor:
        value = self.get(name)
        if name in self._of_sequences:
            return value[sequences]
        return value.reshape(-1)[positions] if value.dim() else value

    def positions_of(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Flat positions of the given sequences, [n], and the cumulative lengths of these sequences, [s + 1] int64."""
        starts, sizes = self.offsets[sequences], self.offsets.diff()[sequences]
        ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        within = torch.arange(int(ends[-1]), device=ends.device)
        sequence = torch.searchsorted(ends[1:-1], within, right=True)
        return within - ends[sequence] + starts[sequence], ends

    def tokens(self, begin: int, end: int) -> Batch:
        """The flat positions from begin to end as one packed sequence; every field has a value per token."""
        taken = {name: self.per_token_field(name).reshape(-1)[begin:end] for name in self.given()}
        advantage, old_logp, ref_logp = (taken.pop(name, None) for name in FIELDS)
        ends = torch.tensor([0, end - begin], device=self.target.device)
        return Batch(self.target.reshape(-1)[begin:end], advantage, old_logp, ref_logp, ends, taken)


def shift_targets(input_ids: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Next-token targets for logits that are not sliced: the logits at position t predict token t + 1.

    This replaces ``logits[:, :-1]``, which would be a copy: the last position gets ``IGNORE``, and its row of logits is
    not read.

    Args:
        input_ids: [B, L] int64, or packed [T] with ``cu_seqlens``, the tokens given to the model.
        mask: shape of ``input_ids``, bool or 0/1: 1 where the *token* is part of the loss (the completion), else 0
            (prompt, padding). None: all tokens.
        cu_seqlens: [S + 1] int32 or int64, as in ``Batch``: no sequence predicts the first token of the next one.

    Returns:
        Shape of ``input_ids``, int64: the token at t + 1 if it is in the same sequence and part of the loss, else
        ``IGNORE``.

    Raises:
        TypeError: when ``input_ids`` is not an int64 tensor, or ``mask`` not a tensor.
        ValueError: when the shapes do not fit.

    Examples:
        >>> uk.shift_targets(torch.tensor([[11, 12, 13]]))
        tensor([[  12,   13, -100]])
        >>> completion = torch.tensor([[0, 0, 1]])
        >>> uk.shift_targets(torch.tensor([[11, 12, 13]]), completion)
        tensor([[-100,   13, -100]])
    """
    check_dtype("input_ids", input_ids, torch.int64)
    expected = 1 if cu_seqlens is not None else 2
    if input_ids.dim() != expected:
        shapes = "[B, L], or [T] with cu_seqlens" if cu_seqlens is None else "[T] with cu_seqlens"
        raise ValueError(f"input_ids must have shape {shapes}, got {tuple(input_ids.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        if mask.shape != input_ids.shape:
            raise ValueError(f"mask must have shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        input_ids = torch.where(mask.bool(), input_ids, IGNORE)
    shifted = torch.full_like(input_ids, IGNORE)
    shifted[..., :-1] = input_ids[..., 1:]
    if cu_seqlens is None:
        return shifted
    sequence = Batch(input_ids, cu_seqlens=cu_seqlens).sequence_of_token
    shifted[:-1].masked_fill_(sequence[:-1] != sequence[1:], IGNORE)
    return shifted
