"""The exchange between ranks that each make a batch with a part of every sequence."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unirl_kernels.ranks.collectives import Group, all_gather, all_texts

REFUSED = -1
"""Sent instead of a number of sequences."""


def refuse(ranks: Group) -> None:
    """Tell the other ranks, which wait in ``agree``, that this one refuses its batch."""
    all_gather(torch.tensor([REFUSED, 0], device="cpu"), ranks)


def agree(n_sequences: int, readings: Mapping[str, str], ranks: Group) -> frozenset[str]:
    """Compare the batches of the ranks.

    Args:
        n_sequences: of this rank.
        readings: by field, the result of ``Batch._reading`` on this rank; of fields that may have a value per sequence.
        ranks: the ranks that have parts of the same sequences.

    Returns:
        Fields that are ambiguous on this rank and have a value per sequence on another one.

    Raises:
        RuntimeError: when another rank refuses its batch.
        ValueError: on every rank, when the ranks have different numbers of sequences, or when a field has a value per
            sequence on one rank and per token on another.
    """
    doubt = "either" in readings.values()
    everyone, doubts = all_gather(torch.tensor([n_sequences, doubt], device="cpu"), ranks).T.tolist()
    if REFUSED in everyone:
        raise RuntimeError(f"sequence_group: rank {everyone.index(REFUSED)} refuses its batch; its error says why")
    for rank, n in enumerate(everyone):
        if n != everyone[0]:
            raise ValueError(
                "batch must hold a part of every sequence on all ranks of sequence_group, got "
                f"{everyone[0]} sequences on rank 0 and {n} on rank {rank}"
            )
    return _of_sequences(readings, ranks) if any(doubts) else frozenset()


def _of_sequences(readings: Mapping[str, str], ranks: Group) -> frozenset[str]:
    """Fields with a value per sequence. If a rank has as many tokens as sequences, the shapes on the other ranks
    decide.

    Raises:
        ValueError: on every rank, when no rank can tell, or two disagree.
    """
    told = all_texts("\n".join(f"{name} {reading}" for name, reading in readings.items()), ranks, torch.device("cpu"))
    everyone = [dict(line.split(" ") for line in text.splitlines()) for text in told]
    spread = set()
    for name in sorted({name for own in everyone for name in own}):
        found = [own.get(name, "all") for own in everyone]
        sure = {reading for reading in found if reading in ("sequence", "token")}
        if len(sure) > 1:
            raise ValueError(
                f"{name} must have a value per sequence or per token on all ranks of sequence_group, got one per "
                f"sequence on rank {found.index('sequence')} and one per token on rank {found.index('token')}"
            )
        if not sure and "either" in found:
            raise ValueError(
                f"{name} is ambiguous: on all ranks of sequence_group target has as many tokens as sequences, some of "
                "them empty; name the fields with a value per sequence: sequence_fields=[...]"
            )
        if sure == {"sequence"}:
            spread.add(name)
    return frozenset(spread)
