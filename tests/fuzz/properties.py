"""Properties without a truth: the same bits when repeated, in another layout, for a row alone, with other threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import unirl_kernels as uk
from tests.fuzz.answers import Question, check
from tests.fuzz.calls import Answer, Request, ask
from tests.fuzz.checks import Findings
from tests.fuzz.inputs import Inputs
from unirl_kernels.backends import cpu

PER_ROW = ("logp", "entropy", "lse", "log_sum_sq_probs", "mean_logit", "argmax", "d_logits")
"""Results that depend on one row only."""


def check_aspect(question: Question, request: Request, answer: Answer, findings: Findings) -> None:
    """Check the property that the case names."""
    ASPECTS[question.case.aspect](question, request, answer, findings)


def _nothing(question: Question, request: Request, answer: Answer, findings: Findings) -> None:
    return


def _again(question: Question, request: Request, answer: Answer, findings: Findings) -> None:
    """The same bits; a head in chunks of another size: within the same budget."""
    for name, x in ask(request).items():
        findings.same(f"again: {name}", x, answer[name].reshape(x.shape))
    if question.case.linear:
        plan = replace(request.plan, max_chunk_bytes=None)
        check(question, ask(replace(request, plan=plan)), request.upstream, findings, "in one chunk: ")


def _threads(question: Question, request: Request, answer: Answer, findings: Findings) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        found = ask(request)
    finally:
        torch.set_num_threads(before)
    if question.case.backend == "eager":  # torch's own sums
        check(question, found, request.upstream, findings, "with other threads: ")
        return
    for name, x in found.items():
        if question.case.linear and not _native_matmuls(question):
            continue
        findings.same(f"with other threads: {name}", x, answer[name].reshape(x.shape))


def _no_grad(question: Question, request: Request, answer: Answer, findings: Findings) -> None:
    """Values are the same with and without a gradient."""
    check(question, ask(replace(request, gradient=False)), request.upstream, findings, "without a gradient: ")


def _overwrite(question: Question, request: Request, answer: Answer, findings: Findings) -> None:
    """A gradient that overwrites the logits has the same bits."""
    if question.case.linear or question.case.layout == "expanded":
        return
    found = ask(replace(request, plan=replace(request.plan, overwrite_logits=True)))
    for name, x in found.items():
        findings.same(f"overwritten: {name}", x, answer[name])


def _native_matmuls(question: Question) -> bool:
    return question.case.backend == "cpu" and not cpu.matmuls_unavailable(getattr(torch, question.case.dtype))


def _layouts(question: Question, request: Request, answer: Answer, findings: Findings) -> None:
    """Packed and contiguous gives the same bits as padded, strided or unaligned."""
    inputs = request.inputs
    n = len(inputs.flat_target)
    if n == inputs.n_sequences and inputs.offsets != list(range(n + 1)):
        return  # a field of [T] could be one of sequences
    found = ask(replace(request, inputs=packed(inputs)))
    # Where a value per sequence is spread over tokens, PyTorch adds the gradients of these in another order in each of
    # the two layouts. In fp64, which hides it for rows of fp32.
    wide = request.loss is not None and request.loss.scope != "token"
    if question.case.backend == "eager" or (wide and question.case.dtype == "float64"):
        check(question, found, request.upstream, findings, "packed: ")
        return
    for name in PER_ROW:
        if name in found and not (question.case.linear and not _native_matmuls(question)):
            findings.same(f"packed: {name}", found[name], answer[name])


def packed(inputs: Inputs) -> Inputs:
    """The same batch with its sequences one behind the other, everything contiguous."""

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(-1, x.shape[-1]).contiguous()

    shape = inputs.target.shape
    per_token = {name for name, x in inputs.fields.items() if x.shape == shape and name not in inputs.of_sequences}
    fields = {name: x.reshape(-1).contiguous() if name in per_token else x for name, x in inputs.fields.items()}
    temperature = inputs.temperature
    if isinstance(temperature, Tensor):
        temperature = torch.where(inputs.valid, inputs.row_temperature, torch.nan).float()
    return replace(
        inputs,
        target=inputs.flat_target.contiguous(),
        cu_seqlens=torch.tensor(inputs.offsets),
        logits=flat(inputs.logits),
        hidden=flat(inputs.hidden),
        fields=fields,
        temperature=temperature,
    )


def _alone(question: Question, request: Request, answer: Answer, findings: Findings) -> None:
    """A row alone has the same bits as in its batch."""
    case, inputs = question.case, request.inputs
    if case.backend == "eager" or case.linear or not len(inputs.flat_target):
        return
    random = case.random("alone")
    whole = request
    if question.loss is not None:
        if any(term.objective.scope != "token" for term in question.loss.terms) or case.kernel == "composed":
            return
        whole = _with_weights_as_fields(question, request)
        answer = ask(whole)
    for t in {random.randrange(len(inputs.flat_target)) for _ in range(2)}:
        found = ask(_row(whole, t))
        for name in PER_ROW:
            if name in found:
                findings.same(f"row {t} alone: {name}", found[name], answer[name][t : t + 1])


def _with_weights_as_fields(question: Question, request: Request) -> Request:
    """The same loss, whose weights do not depend on what else is in the batch."""
    assert question.loss is not None
    inputs = request.inputs
    fields = {name: inputs.per_token(name).reshape(inputs.target.shape) for name in inputs.fields}
    loss: uk.Loss | int = 0
    for k, term in enumerate(question.loss.terms):
        weights = term.coefficient * term.aggregation.weights(inputs)
        fields[f"weight{k}"] = weights.reshape(inputs.target.shape)
        loss = loss + uk.Loss(term.objective, uk.Weighted(uk.TokenMean(1), f"weight{k}"))
    changed = replace(packed(replace(inputs, fields=fields, of_sequences=set())), cu_seqlens=None)
    n = len(inputs.flat_target)
    changed = replace(changed, cu_seqlens=torch.tensor([0, n]), offsets=[0, n])
    assert isinstance(loss, uk.Loss)
    return replace(request, inputs=changed, loss=loss)


def _row(request: Request, t: int) -> Request:
    """A call with one position of a packed batch, or of any batch where there is no loss."""
    inputs = request.inputs
    assert inputs.logits is not None
    temperature = inputs.temperature
    if isinstance(temperature, Tensor):
        temperature = inputs.row_temperature[t : t + 1].float()
    one = replace(
        inputs,
        target=inputs.flat_target[t : t + 1],
        cu_seqlens=torch.tensor([0, 1]),
        offsets=[0, 1],
        logits=inputs.logits.reshape(-1, inputs.logits.shape[-1])[t : t + 1].clone(),
        fields={name: x.reshape(-1)[t : t + 1] for name, x in inputs.fields.items()},
        temperature=temperature,
    )
    upstream = request.upstream if request.upstream.dim() == 0 else request.upstream[:, t : t + 1]
    return replace(request, inputs=one, upstream=upstream)


ASPECTS: dict[str, Callable[[Question, Request, Answer, Findings], None]] = {
    "again": _again,
    "alone": _alone,
    "layouts": _layouts,
    "no_grad": _no_grad,
    "nothing": _nothing,
    "overwrite": _overwrite,
    "threads": _threads,
}
