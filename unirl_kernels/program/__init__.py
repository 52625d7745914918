"""One definition of an objective, derived for every kernel: trace, differentiate, encode."""

from unirl_kernels.program.evaluate import evaluate
from unirl_kernels.program.ir import (
    MAX_FIELDS,
    MAX_INSTRUCTIONS,
    MAX_PARAMS,
    OUTPUTS,
    STATISTICS,
    ZERO,
    Op,
    Program,
    parsed,
)
from unirl_kernels.program.trace import Traced, UnsupportedOperation, trace, weight_name

__all__ = [
    "MAX_FIELDS",
    "MAX_INSTRUCTIONS",
    "MAX_PARAMS",
    "OUTPUTS",
    "STATISTICS",
    "ZERO",
    "Op",
    "Program",
    "Traced",
    "UnsupportedOperation",
    "evaluate",
    "parsed",
    "trace",
    "weight_name",
]
