"""The columns of a split vocabulary that one rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from unirl_kernels.ranks.collectives import Group, group_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """The columns that this rank holds of a vocabulary that is split over a process group.

    A rank's logits are [..., n], or its weight is [n, D], for the columns ``start`` to ``start + n``. The shards follow
    one another in the order of ranks. n may differ between ranks and may be 0. Columns from ``vocab`` on are padding:
    they are left out, and their gradient is 0. All ranks pass the same targets, of the whole vocabulary, and the same
    fields. All ranks get the same results, to the bit.

    Args:
        group: the process group over which the vocabulary is split.
        start: the first column of this rank, >= 0.
        vocab: V, columns of the whole vocabulary without padding, > 0.
        hidden: hidden states of linear heads. ``"whole"``: each rank has those of all tokens, and their gradient is
            summed over the group in float32. ``"partial"``: the same, but the gradient is not summed: it is this rank's
            part, and the caller sums it (Megatron's copy_to and gather_from regions). ``"split"``: each rank has an
            equal part of the tokens, in the order of ranks, [B, L / n, D] or [T / n, D] on n ranks, with a target of
            all tokens (sequence parallelism). Hidden states are gathered once, and their gradient is reduced and
            scattered. ``"fsdp"``: each rank has other sequences, see ``of_fsdp``.
        tiles: None: each rank sends one set of partial sums. A number: the vocabulary is cut into so many equal tiles,
            whose partial sums are sent and merged in order. Log-probabilities then have the same bits for every number
            of ranks that divides ``tiles``, 1 included. Every shard must start at a tile, a multiple of ceil(V /
            tiles). A rank needs 16 * ``tiles`` bytes per token. Heads need matmuls whose logits do not depend on the
            number of columns, as those of the CPU backend. Observations need None.

    Raises:
        TypeError: when ``group`` is not a process group, or ``start``, ``vocab`` or ``tiles`` not an int.
        ValueError: when ``start``, ``vocab`` or ``tiles`` is out of range, ``start`` is inside a tile, ``hidden`` is
            not one of the four words, or this process is not in the group.

    Examples:
        A group of one rank, which has all columns:

        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> shard = uk.VocabShard(dist.group.WORLD, start=0, vocab=4)
        >>> uk.token_stats(torch.zeros(1, 1, 6), torch.tensor([[3]]), shard=shard).logp  # 2 columns are padding
        tensor([[-1.3863]])
        >>> dist.destroy_process_group()
    """

    group: ProcessGroup
    start: int
    vocab: int
    hidden: Literal["whole", "partial", "split", "fsdp"] = "whole"
    tiles: int | None = None
    # Not a field of the dataclass: it follows from the group.
    ranks: ClassVar[Group]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", group_of("group", self.group))
        for name, least in (("start", 0), ("vocab", 1), ("tiles", 1)):
            value = getattr(self, name)
            if name == "tiles" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.hidden not in ("whole", "partial", "split", "fsdp"):
            raise ValueError(f"hidden must be 'whole', 'partial', 'split' or 'fsdp', got {self.hidden!r}")

        if self.tiles is not None and self.start < self.vocab and self.start % self.tile:
            raise ValueError(f"start must be a multiple of the {self.tile} columns of a tile, got {self.start}")

    @classmethod
    def of_fsdp(cls, weight: Tensor, model: torch.nn.Module) -> VocabShard:
        """The shard of a head's weight that FSDP2 has sharded, for a loss that does not gather the weight.

        Hidden states are gathered instead, and their gradient is reduced and scattered. Pass to the loss function
        ``weight.to_local()``, the hidden states [B, L, D] or [T, D] of this rank's sequences, and
        ``global_batch(batch, group)``, the batch of all ranks. All ranks must have the same number of tokens.

        FSDP2 takes the mean of the gradients over the n ranks. The gradients fit this if the loss is the mean of the
        ranks' losses (any aggregation of all sequences or tokens without a ``count``): the gradient of the shard is
        complete, and that of hidden is multiplied by n, since FSDP2 divides by n all gradients that follow from it.

        Args:
            weight: [V, D], the parameter as ``fully_shard`` keeps it: a DTensor of placement ``Shard(0)`` on a mesh of
                one dimension. The head needs its own ``fully_shard``; otherwise FSDP2 gathers it with the others.
            model: the whole model, which must hold the weight once: FSDP2 gathers a weight that is tied to an
                embedding, and reduces a second gradient for it.

        Raises:
            TypeError: when ``weight`` is not a DTensor, or ``model`` not a module.
            ValueError: when the placement is another one, or ``model`` holds the weight twice or not at all.
        """
        if type(weight).__name__ != "DTensor":
            raise TypeError(
                f"weight must be a DTensor, as fully_shard keeps it, got {type(weight).__name__}: FSDP2 has gathered "
                "it, or not sharded it; give the head a fully_shard of its own"
            )
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        names = [name for name, x in model.named_parameters(remove_duplicate=False) if x is weight]
        if len(names) != 1:
            got = f"one that is tied: {', '.join(names)}" if names else "one that model does not hold"
            raise ValueError(f"weight must be a parameter of the head alone, got {got}")
        kept: Any = weight
        if [(type(x).__name__, getattr(x, "dim", None)) for x in kept.placements] != [("Shard", 0)]:
            raise ValueError(
                f"weight must be Shard(0) on a mesh of one dimension, got {kept.placements}; the gradients of "
                "replicated or further sharded shards would have to be reduced by FSDP2"
            )
        mesh, vocab = kept.device_mesh, weight.shape[0]
        start = -(-vocab // mesh.size()) * mesh.get_local_rank()
        return cls(mesh.get_group(), min(start, vocab), vocab, hidden="fsdp")

    @property
    def parts(self) -> int:
        """The number of ranks over which hidden states are split."""
        return self.ranks.size if self.hidden in ("split", "fsdp") else 1

    @property
    def tile(self) -> int:
        """Columns of a tile; the whole vocabulary without tiles."""
        return -(-self.vocab // (self.tiles or 1))

    @property
    def slots(self) -> int:
        """Tiles that a rank sends."""
        return -(-(self.tiles or 1) // (self.ranks.size if self.tiles else 1))

    def used(self, columns: int) -> int:
        """The number of a rank's columns that are not padding."""
        return max(0, min(columns, self.vocab - self.start))
