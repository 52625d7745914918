"""The paradigm's algorithms by name: each is an objective and an aggregation."""

from __future__ import annotations

from collections.abc import Sequence

from unirl_kernels.objectives import (
    DPO,
    KL,
    RFT,
    SFT,
    Clip,
    LogRatio,
    Loss,
    OnlineRFT,
    PairMean,
    PolicyGradient,
    Ratio,
    SequenceMean,
)


def sft() -> Loss:
    """Supervised fine-tuning on given answers; see ``SFT``."""
    return Loss(SFT(), SequenceMean())


def rft() -> Loss:
    """Fine-tuning on the accepted samples of the frozen model; see ``RFT``. ``batch.advantage`` is I(o)."""
    return Loss(RFT(), SequenceMean())


def online_rft() -> Loss:
    """Fine-tuning on the accepted samples of the policy itself; see ``OnlineRFT``. ``batch.advantage`` is I(o)."""
    return Loss(OnlineRFT(), SequenceMean())


def dpo(beta: float = 0.1, length_normalized: bool = False) -> Loss:
    """Direct preference optimisation, mean over pairs; see ``DPO``. Reads ``batch.ref_logp``."""
    # A compiler that follows this function makes the score, but does not know a class's default.
    return Loss(DPO(beta, length_normalized, LogRatio()), PairMean())


def ppo(clip: float | Sequence[float] = 0.2) -> Loss:
    """Proximal policy optimisation; see ``Clip``.

    Args:
        clip: how far the ratio may leave 1, or (below, above).
    """
    return Loss(_clip(clip), SequenceMean())


def grpo(clip: float | Sequence[float] | None = 0.2, beta: float | None = 0.04) -> Loss:
    """Group-relative policy optimisation; see ``PolicyGradient``.

    Args:
        clip: how far the ratio may leave 1, or (below, above); None is eq. 12 exactly as printed, without a clip.
        beta: KL coefficient; None or 0 leaves the penalty out, and no ``batch.ref_logp`` is read.
    """
    surrogate = Ratio() if clip is None else _clip(clip)
    return Loss(PolicyGradient(surrogate, KL(beta) if beta else None), SequenceMean())


def _clip(clip: float | Sequence[float]) -> Clip:
    bounds = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    if len(bounds) != 2:
        raise ValueError(f"clip must be a number or (below, above), got {clip!r}")
    return Clip(*bounds)
