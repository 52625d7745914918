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
    """Supervised fine-tuning on given answers, the loss -log pi(o_t), mean over sequences; see ``SFT``.

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 2.

    Returns:
        ``Loss`` of token scope.

    Examples:
        >>> uk.fused_loss(torch.zeros(1, 2, 4), uk.Batch(torch.tensor([[3, 1]])), uk.sft()).loss  # log 4
        tensor(1.3863)
    """
    return Loss(SFT(), SequenceMean())


def rft() -> Loss:
    """Fine-tuning on the accepted samples of the frozen model, the loss -I(o) log pi(o_t); see ``RFT``.

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 3. ``batch.advantage`` is the verdict I(o), 1 or 0.

    Returns:
        ``Loss`` of token scope, mean over sequences.

    Examples:
        >>> verdicts = torch.tensor([1.0, 0.0])  # the second sample was rejected
        >>> batch = uk.Batch(torch.tensor([[3, 1], [2, 2]]), advantage=verdicts)
        >>> uk.fused_loss(torch.zeros(2, 2, 4), batch, uk.rft()).loss  # (log 4 + 0) / 2
        tensor(0.6931)
    """
    return Loss(RFT(), SequenceMean())


def online_rft() -> Loss:
    """``rft`` on samples of the policy that is being trained; see ``OnlineRFT``. The formula is the same.

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 5. ``batch.advantage`` is the verdict I(o), 1 or 0.

    Returns:
        ``Loss`` of token scope, mean over sequences.

    Examples:
        >>> batch = uk.Batch(torch.tensor([[3, 1], [2, 2]]), advantage=torch.tensor([1.0, 0.0]))
        >>> uk.fused_loss(torch.zeros(2, 2, 4), batch, uk.online_rft()).loss
        tensor(0.6931)
    """
    return Loss(OnlineRFT(), SequenceMean())


def dpo(beta: float = 0.1, length_normalized: bool = False) -> Loss:
    """Direct preference optimisation, mean over pairs; see ``DPO``. Reads ``batch.ref_logp``.

        -log sigma(beta (R(o+) - R(o-)))        R(o) = sum_t log pi(o_t) / pi_ref(o_t)

    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7.

    Args:
        beta: inverse temperature of the preference model, > 0.
        length_normalized: divide R(o) by the length of o.

    Returns:
        ``Loss`` of pair scope; ``batch.pairs`` says which sequences are the chosen ones.

    Raises:
        TypeError: when ``beta`` is not a number.
        ValueError: when ``beta`` is not positive.

    Examples:
        >>> batch = uk.Batch(torch.tensor([[3], [1]]), ref_logp=torch.tensor([[-2.0], [-1.0]]))
        >>> uk.fused_loss(torch.zeros(2, 1, 4), batch, uk.dpo(beta=1.0)).loss  # -log sigma(2 - 1)
        tensor(0.3133)
    """
    # A compiler that follows this function makes the score, but does not know a class's default.
    return Loss(DPO(beta, length_normalized, LogRatio()), PairMean())


def ppo(clip: float | Sequence[float] = 0.2) -> Loss:
    """Proximal policy optimisation, mean over sequences; see ``Clip``. Reads ``batch.advantage`` and ``old_logp``.

        -min(r A, clip(r, 1 - low, 1 + high) A)        r = pi / pi_old

    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7.

    Args:
        clip: low and high, one number for both or a pair (low, high); low in [0, 1], high >= 0.

    Returns:
        ``Loss`` of token scope.

    Raises:
        TypeError: when a bound is not a number.
        ValueError: when a bound is outside its range, or ``clip`` is neither a number nor a pair.

    Examples:
        The ratio is 0.25 / 0.125 = 2, and the clip bounds it by 1.2:

        >>> old_logp = torch.full((1, 1), 0.125).log()
        >>> batch = uk.Batch(torch.tensor([[3]]), torch.tensor([1.0]), old_logp)
        >>> uk.fused_loss(torch.zeros(1, 1, 4), batch, uk.ppo(clip=0.2)).loss
        tensor(-1.2000)
    """
    return Loss(_clip(clip), SequenceMean())


def grpo(clip: float | Sequence[float] | None = 0.2, beta: float | None = 0.04) -> Loss:
    """Group-relative policy optimisation, mean over sequences: PPO's loss plus a KL penalty; see ``PolicyGradient``.

        -min(r A, clip(r, 1 - low, 1 + high) A) + beta (e^d - d - 1)        r = pi / pi_old,  d = log pi_ref - log pi

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 12. ``group_advantages`` gives ``batch.advantage``.

    Args:
        clip: low and high, one number for both or a pair (low, high); None is eq. 12 as printed, -r A without a clip.
        beta: coefficient of the penalty, >= 0; None or 0 leaves it out, and ``batch.ref_logp`` is not read.

    Returns:
        ``Loss`` of token scope.

    Raises:
        TypeError: when a number is not one.
        ValueError: when a number is outside its range, or ``clip`` is neither a number nor a pair.

    Examples:
        On policy the ratio is 1. The reference gives the token probability 1, so that d = log 4:

        >>> batch = uk.Batch(torch.tensor([[3]]), torch.tensor([1.0]), ref_logp=torch.zeros(1, 1))
        >>> uk.fused_loss(torch.zeros(1, 1, 4), batch, uk.grpo(beta=0.04)).loss  # -1 + 0.04 (4 - log 4 - 1)
        tensor(-0.9355)
    """
    surrogate = Ratio() if clip is None else _clip(clip)
    return Loss(PolicyGradient(surrogate, KL(beta) if beta else None), SequenceMean())


def _clip(clip: float | Sequence[float]) -> Clip:
    bounds = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    if len(bounds) != 2:
        raise ValueError(f"clip must be a number or (below, above), got {clip!r}")
    return Clip(*bounds)
