"""The checks of every answer: values and gradients are within their budgets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tests.fuzz import inputs as making
from tests.fuzz import losses
from tests.fuzz.calls import STATISTICS, Answer
from tests.fuzz.case import Case
from tests.fuzz.checks import Findings, combined, stored
from tests.fuzz.inputs import Inputs
from tests.fuzz.operands import flat_operands, plain_logits
from tests.fuzz.yardstick import ULPS, Coefficients, Rows, coefficients, row_dtype, rows_of
from unirl_kernels.backends import cpu

SHORT_EXPONENTIALS = {"bfloat16": 1.55e-4, "float16": 2.84e-6}
"""Relative errors of the polynomials that the native kernels take for gradients in 16 bits (``EXP2`` in
csrc/exponential.h; the table of AVX-512 errs less). An element of a row is a product with one exponential, and rounds
by 3.9e-3 and 4.9e-4."""


@dataclass(frozen=True)
class Question:
    """A case with its tensors, the truth of its rows, and its loss."""

    case: Case
    inputs: Inputs
    rows: Rows
    loss: losses.RandomLoss | None
    coefficients: Coefficients | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation and results."""
        return row_dtype(self.case.dtype)

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps


def question_of(case: Case) -> Question:
    """A case with its truth, and the allowed errors."""
    inputs = making.make(case)
    exact, plain = plain_logits(inputs)
    rows = rows_of(exact, plain, inputs)
    if not case.level.endswith("loss"):
        return Question(case, inputs, rows, None, None)
    loss = losses.make(inputs)
    names = loss.reads
    if "old_logp" in names and case.random("on policy").random() < 0.25:
        names.discard("old_logp")
    making.add_fields(inputs, names, rows.stats.logp)
    found = coefficients(partial(loss.evaluate, inputs), rows, row_dtype(case.dtype))
    return Question(case, inputs, rows, loss, found)


def check(question: Question, answer: Answer, upstream: Tensor, findings: Findings, prefix: str = "") -> None:
    """Compare an answer with the truth."""
    _check_values(question, answer, findings, prefix)
    if question.coefficients is not None:
        own = question.coefficients.derivatives
        weights = upstream.double() * own
        of_one = question.coefficients.derivatives_allowed
        allowed = torch.where(weights.isnan() | (of_one == torch.inf), torch.inf, upstream.double().abs() * of_one)
    else:
        weights = own = torch.where(question.inputs.valid, upstream, 0).nan_to_num(0)
        allowed = torch.zeros_like(weights)
    d_logits, d_allowed = combined(weights, allowed, question.rows.basis, question.rows.basis_allowed, question.eps)
    within = d_logits.isfinite().all(-1) & ~_overflows(question, own)
    d_allowed = torch.where(within.unsqueeze(-1), d_allowed, torch.inf)
    # Gradients are made before the upstream one is known, which may be 0.
    made = (own.nan_to_num().unsqueeze(-1) * question.rows.basis).abs().sum(0)
    if "d_logits" in answer:
        factor = float(upstream) if upstream.dim() == 0 else 1.0
        _check_rows(question, answer["d_logits"], d_logits, d_allowed, made, factor, findings, prefix)
    elif "d_hidden" in answer:
        _check_head(question, answer, weights, d_logits, d_allowed, made, findings, prefix)


def _overflows(question: Question, own: Tensor) -> Tensor:
    """[T]: where the entropy's coefficient times kappa du/dx times kappa overflows fp32.

    The C++ kernels pass this factor to the second sweep in fp32. There it is multiplied by small differences of u.
    """
    case = question.case
    if case.backend != "cpu" or question.dtype == torch.float64:
        return torch.zeros_like(own[1], dtype=torch.bool)
    kappa = (case.softcap or abs(case.scale)) / question.inputs.row_temperature
    slope = abs(case.scale) / question.inputs.row_temperature
    return own[1].abs() * slope * kappa > torch.finfo(torch.float32).max


def _check_values(question: Question, answer: Answer, findings: Findings, prefix: str) -> None:
    rows, valid = question.rows, question.inputs.valid
    for k, name in enumerate(STATISTICS):
        x = answer[name]
        findings.require(x.dtype == question.dtype, f"{prefix}{name} is {x.dtype}")
        findings.close(prefix + name, x, rows.stats[k], rows.stats_allowed[k])
        findings.require(not bool(x[~valid].any()), f"{prefix}{name} of an ignored position is not 0")
    findings.require(bool(((answer["logp"] <= 0) | answer["logp"].isnan()).all()), f"{prefix}logp above 0")
    findings.require(bool(((answer["entropy"] >= 0) | answer["entropy"].isnan()).all()), f"{prefix}entropy below 0")
    if "argmax" in answer:
        _check_observations(question, answer, findings, prefix)
    if question.coefficients is not None:
        found = question.coefficients
        findings.close(prefix + "terms", answer["terms"], found.terms, found.terms_allowed)
        total = found.terms.sum()
        findings.close(prefix + "loss", answer["loss"], total, found.terms_allowed.sum())


def _check_observations(question: Question, answer: Answer, findings: Findings, prefix: str) -> None:
    rows, valid = question.rows, question.inputs.valid
    for k, name in enumerate(("log_sum_sq_probs", "mean_logit")):
        truth = torch.where(valid, rows.observations[k], 0)
        findings.close(prefix + name, answer[name], truth, rows.observations_allowed[k])
    findings.require(bool((answer["log_sum_sq_probs"] <= 0).all()), f"{prefix}log_sum_sq_probs above 0")
    argmax = answer["argmax"]
    findings.require(bool((argmax[~valid] == -1).all()), f"{prefix}argmax of an ignored position is not -1")
    if question.case.linear:  # rounding of the matmul decides between equal logits
        return
    findings.require(
        bool((argmax == rows.observations.argmax)[valid].all()), f"{prefix}argmax is not the first largest"
    )


def _check_rows(
    question: Question,
    x: Tensor,
    truth: Tensor,
    allowed: Tensor,
    made: Tensor,
    upstream: float,
    findings: Findings,
    prefix: str,
) -> None:
    """Gradients of logits. Nothing is asked where ``made``, the size of what they are made of, leads beyond the
    largest number."""
    case, dtype = question.case, getattr(torch, question.case.dtype)
    findings.require(x.dtype == dtype, f"{prefix}d_logits is {x.dtype}")
    once = _half_ulps(case)
    again = upstream != 1 and question.loss is not None
    if case.backend == "cpu":
        allowed = allowed + SHORT_EXPONENTIALS.get(case.dtype, 0.0) * truth.abs()
    allowed = torch.where(made > torch.finfo(_made_in(question)).max, torch.inf, allowed)
    limits = stored(allowed, truth, dtype, once * (1 + again), upstream)
    findings.close(prefix + "d_logits", x, truth, limits)
    ignored = x[~question.inputs.valid]
    findings.require(not bool(ignored.any()), f"{prefix}d_logits of an ignored position is not 0")


def _half_ulps(case: Case) -> int:
    """By how many half ulps a kernel's rounding may be off: Triton's interpreter cuts off. Those of torch by one."""
    return 2 if case.backend == "triton" and not torch.cuda.is_available() else 1


def _made_in(question: Question) -> torch.dtype:
    """What holds the gradient of logits before the upstream one multiplies it: of fp16, fp32 unless a kernel is named
    that takes one pass."""
    dtype = getattr(torch, question.case.dtype)
    one_pass = question.loss is not None and question.case.kernel not in (None, "composed")
    return question.dtype if dtype == torch.float16 and not one_pass else dtype


def _check_head(
    question: Question,
    answer: Answer,
    weights: Tensor,
    truth: Tensor,
    allowed: Tensor,
    made: Tensor,
    findings: Findings,
    prefix: str,
) -> None:
    """Gradients of hidden states, weight and bias: no worse than plain PyTorch, and what their logits' gradient may
    be off. Nothing is asked where ``made``, the size of that gradient, leads beyond the largest number."""
    dtype = getattr(torch, question.case.dtype)
    hidden, weight, bias = flat_operands(question.inputs)
    open_rows = (allowed == torch.inf).any(-1)
    closed = torch.where(open_rows.unsqueeze(-1), 0, allowed)
    truth = torch.where(open_rows.unsqueeze(-1), 0, truth)
    rounding = _operand_rounding(question)
    d_plain = [
        (weights.nan_to_num().unsqueeze(-1) * plain.double()).sum(0).to(question.dtype) for plain in question.rows.plain
    ]
    d_plain = [torch.where(open_rows.unsqueeze(-1), 0, d) for d in d_plain]

    again = question.loss is not None and question.case.upstream != 1

    def hold(name: str, left: Tensor, right: Tensor, plains: list[Tensor], row: int | None, holes: Tensor) -> None:
        exact = left.double() @ right.double()
        size = left.double().abs() @ right.double().abs()
        beyond = (made if row == 0 else made.t()) @ right.double().abs() > torch.finfo(question.dtype).max
        own = closed if row == 0 else closed.t()
        budget = own @ right.double().abs() + (ULPS * question.eps + rounding) * size
        worst = torch.stack([(p.double() - exact).abs() for p in plains]).amax(0)
        budget = budget + 2 * (worst.amax(-1, keepdim=True) if row == 0 else worst)
        limits = stored(budget, exact, dtype, 1 + again * _half_ulps(question.case))
        budget = torch.where(holes | beyond, torch.inf, limits)
        findings.require(answer[name].dtype == dtype, f"{prefix}{name} is {answer[name].dtype}")
        findings.close(prefix + name, answer[name], exact, budget)

    h, w = hidden.to(question.dtype), weight.to(question.dtype)
    hold("d_hidden", truth, w, [d @ w for d in d_plain], 0, open_rows.unsqueeze(-1))
    anywhere = open_rows.any()
    hold("d_weight", truth.t(), h, [d.t() @ h for d in d_plain], 1, anywhere)
    if bias is not None:
        ones = torch.ones(len(truth), 1, dtype=question.dtype)
        answer["d_bias"] = answer["d_bias"].unsqueeze(-1)
        hold("d_bias", truth.t(), ones, [d.t() @ ones for d in d_plain], 1, anywhere)
    ignored = answer["d_hidden"][~question.inputs.valid]
    findings.require(not bool(ignored.any()), f"{prefix}d_hidden of an ignored position is not 0")


def _operand_rounding(question: Question) -> float:
    """Of the logits' gradient, where a matmul takes it in bf16."""
    case = question.case
    weight = getattr(torch, case.dtype)
    if case.backend != "cpu" or cpu.matmuls_unavailable(weight) or cpu.matmul_arithmetic(weight) != "bf16":
        return 0.0
    return torch.finfo(torch.bfloat16).eps / 2
