"""One definition of an objective, derived for every kernel: trace, differentiate, encode."""

from unirl_kernels.program.ir import (
    MAX_FIELDS,
    MAX_INSTRUCTIONS,
    MAX_PARAMS,
    OUTPUTS,
    STATISTICS,
    ZERO,
    Op,
    Program,
    evaluate,
    parsed,
)
from unirl_kernels.program.operands import DEMANDS, UnsupportedOperation
from unirl_kernels.program.trace import Traced, trace, weight_name

__all__ = [
    "DEMANDS",
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
