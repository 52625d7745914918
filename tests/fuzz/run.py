"""Runs one case."""

from __future__ import annotations

import torch

from tests.fuzz.answers import check, question_of
from tests.fuzz.calls import ask, request_of
from tests.fuzz.case import Case
from tests.fuzz.checks import Findings
from tests.fuzz.properties import check_aspect


def run(case: Case) -> Findings:
    """What is wrong with a case. What the package raises is wrong: all cases are valid."""
    findings = Findings()
    question = question_of(case)
    given = [x.clone() for x in question.inputs.given]
    try:
        loss = None if question.loss is None else question.loss.made(case.random("made"))
        request = request_of(question.inputs, loss)
        answer = ask(request)
        check(question, answer, request.upstream, findings)
        check_aspect(question, request, answer, findings)
    except Exception as error:
        findings.problems.append(f"raised {type(error).__name__}: {str(error)[:600]}")
    for before, now in zip(given, question.inputs.given, strict=True):
        same = (
            torch.equal(before, now)
            if not before.is_floating_point()
            else torch.equal(before.nan_to_num(7), now.nan_to_num(7))
        )
        findings.require(same, f"an argument of shape {tuple(now.shape)} was changed")
    return findings


def described(case: Case) -> str:
    """Describe a case in full."""
    question = question_of(case)
    loss = "" if question.loss is None else f"\n{question.loss}"
    fields = "".join(
        f"\n{name}: {x.dtype} {tuple(x.shape)} strides {x.stride()}" for name, x in question.inputs.fields.items()
    )
    return f"case {case.name}: {case}{loss}{fields}"
