"""One definition of an objective, derived for every kernel: trace, differentiate, encode."""

from unirl_kernels.program.evaluate import evaluate
from unirl_kernels.program.ir import (
    INPUTS,
    MAX_INSTRUCTIONS,
    MAX_PARAMS,
    OUTPUTS,
    STATISTICS,
    ZERO,
    Op,
    Program,
)
from unirl_kernels.program.trace import Traced, UnsupportedOperation, trace

__all__ = [
    "INPUTS",
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
    "trace",
]
