"""``explain``: the derivative, the generated function and the backends of a loss, as text."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import indent

import torch
from torch import Tensor

from unirl_kernels.backends import COMPOSED, MODULES, choices_by_vocab, choose, load, told, unavailable
from unirl_kernels.backends.triton.lowering import source
from unirl_kernels.batch import Batch
from unirl_kernels.head import Head, by_units
from unirl_kernels.objectives import Loss
from unirl_kernels.plan import Plan
from unirl_kernels.program import STATISTICS, Traced, UnsupportedOperation
from unirl_kernels.program.derive import derivative
from unirl_kernels.program.formula import formula
from unirl_kernels.program.trace import name_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TWO_PASSES = (
    "two passes: {}. Statistics (one read),\n"
    "the objectives on [T] vectors under autograd, the gradient (one read, one write)."
)


@dataclass(frozen=True)
class Explanation:
    """Sections of text; ``str`` and ``print`` show them all.

    Args:
        paradigm: the row of the unified paradigm's table; empty for an objective outside it.
        schedule: the number of passes over the logits, and why.
        coefficient: the loss of a token and its derived gradient coefficient GC; empty if it is not traced.
        function: source of the generated device function; empty if it is not traced.
        backends: which backends would run it on this machine, and why the others would not.
    """

    paradigm: str
    schedule: str
    coefficient: str
    function: str
    backends: str

    def __str__(self) -> str:
        sections = {
            "Row of the unified paradigm": self.paradigm,
            "Schedule": self.schedule,
            "Derived coefficient": self.coefficient,
            "Generated function": self.function,
            "Backends here": self.backends,
        }
        return "\n\n".join(f"{title}\n{indent(text.rstrip(), '    ')}" for title, text in sections.items() if text)

    __repr__ = __str__


def explain(
    loss: Loss, *, batch: Batch | None = None, weight: Tensor | None = None, plan: Plan = Plan()
) -> Explanation:
    """Show what a loss is, the coefficient that was derived from it, and what would run it.

        GC = -d loss / d logp                    Shao et al. 2024 (arXiv:2402.03300v3), eq. 1

    Args:
        loss: an objective and its aggregation, or a sum of losses.
        batch: if it has no ``old_logp``, the coefficient is that on policy. With ``weight``, the schedule also says how
            ``fused_linear_loss`` would cut the batch into chunks.
        weight: [V, D], the weight of a linear head.
        plan: how the machine would compute it.

    Returns:
        ``Explanation``, sections of text; print it, or one of them.

    Raises:
        TypeError: when an argument has another type, or ``weight`` not two dimensions.

    Examples:
        >>> print(uk.explain(uk.rft()).coefficient)
        loss = -(advantage * logp)
        GC = advantage
    """
    for name, value, kind in (("loss", loss, Loss), ("plan", plan, Plan), ("batch", batch, Batch | None)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {name.title()}, got {type(value).__name__}")
    if weight is not None and (not isinstance(weight, Tensor) or weight.dim() != 2):
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a tensor [V, D], got {got}")
    coefficient = function = ""
    kernels = False
    if loss.scope != "token":
        schedule = TWO_PASSES.format(f"the coefficient of a token depends on its whole {loss.scope}")
    else:
        try:
            traced = loss.traced(on_policy=batch is not None and batch.on_policy)
            coefficient = _coefficient(traced)
            function = source(traced.program)
            n = len(traced.program.instructions)
            kernels = plan.kernel != COMPOSED
            schedule = (
                f"one pass: {n} scalar operations per row inside the kernel (one read, one write)."
                if kernels
                else TWO_PASSES.format("the plan asks for them")
            )
        except UnsupportedOperation as error:
            schedule = f"only with Plan(kernel='composed'): {error}"
    schedule += f"\nlinear head: {_linear(loss, batch, weight, plan)}\n{_aggregations(loss)}"
    return Explanation(_row(loss), schedule, coefficient, function, _backends(kernels))


def _aggregations(loss: Loss) -> str:
    if len(loss.terms) == 1:
        return f"aggregation: {loss.aggregation}"
    return "\n".join(
        f"term {k}: {term.coefficient} * {name_of(term.objective)}, aggregation: {term.aggregation}"
        for k, term in enumerate(loss.terms)
    )


def _linear(loss: Loss, batch: Batch | None, weight: Tensor | None, plan: Plan) -> str:
    """How many matmuls a linear head takes, and why."""
    apart = "four matmuls (statistics first, the logits once more in the backward)"
    if batch is None or weight is None:
        if loss.scope == "token":
            return "three matmuls, a chunk of tokens at a time."
        return f"three matmuls where each {loss.scope} fits a chunk, else\n{apart}. Give batch and weight to see."
    backend = choose(weight.device, plan.backend, plan.kernel).backend
    head = Head(weight, weight, None, weight.dtype, backend, plan.max_chunk_bytes)
    if loss.scope == "token" and head.matmuls.gradient_bytes:
        groups = [[chunk.n for chunk in group] for group in head.groups(batch.target)]
        sizes, kept = [n for group in groups for n in group], max(map(sum, groups), default=0)
        most = max(sizes, default=0)
        return f"three matmuls; chunks: {len(sizes)}, of at most {most} tokens; gradients are kept for {kept} tokens."
    rows = head.rows_per_chunk()
    parts = by_units(batch, loss.scope, rows)
    if parts is None:
        return f"{apart}:\na {loss.scope} is longer than a chunk of {rows} tokens."
    longest = max((part.chunk.n for part in parts), default=0)
    return f"three matmuls; chunks: {len(parts)}, of at most {longest} tokens ({rows} would fit)."


def _row(loss: Loss) -> str:
    row = loss.paradigm
    if row is None:
        return ""
    cells = {
        "algorithm": f"{row.algorithm}, equation {row.equations}",
        "data source": row.data_source,
        "reward": row.reward,
        "objective": row.objective,
        "coefficient": row.coefficient,
    }
    return "\n".join(f"{name:<12} {text}" for name, text in cells.items())


def _coefficient(traced: Traced) -> str:
    """Loss and derivatives of each term as formulas. GC is minus the derivative of the loss, as in the paradigm."""
    outputs = []
    for k, term in enumerate(traced.terms):
        at = f"[{k}]" if len(traced.terms) > 1 else ""
        outputs.append((f"loss{at}", term))
        for name in STATISTICS:
            slope = derivative(term, name)
            if name == "logp":
                outputs.append((f"GC{at}", -slope))
            elif slope.constant != 0:
                outputs.append((f"d_{name}{at}", slope))
    return formula(*outputs)


def _backends(one_pass: bool) -> str:
    lines = []
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        for name in MODULES:
            reason = unavailable(name, device)
            kernels = (*load(name).KERNELS, COMPOSED) if one_pass else (COMPOSED,)
            lines.append(f"{device.type:<5} {name:<7} {', '.join(kernels) if reason is None else f'no: {reason}'}")
        if one_pass:
            lines.append(defaults(device))
    return "\n".join(lines)


def defaults(device: torch.device) -> str:
    """The default backend and kernel of a device; per dtype of the logits if it depends on the dtype."""
    texts = {name: told(choices_by_vocab(device, None, None, dtype)) for name, dtype in DTYPES.items()}
    same = len(set(texts.values())) == 1
    lines = [f"{device.type:<5} {'' if same else name:<7} default: {text}" for name, text in texts.items()]
    return "\n".join(lines[:1] if same else lines)
