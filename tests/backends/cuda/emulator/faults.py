"""Mistakes that a kernel's author can make, planted into the kernels to see the tests go red.

All of them are compiled into one module; at run time one of them is there, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.backends.cuda.emulator.build import Change


@dataclass(frozen=True)
class Edit:
    """What stands once in a file of csrc, and what the fault makes of it: an expression, or statements."""

    file: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Fault:
    """
    Args:
        name: what is wrong.
        symptom: a pattern of what is said of it.
        edits: all of them make the fault.
    """

    name: str
    symptom: str
    edits: tuple[Edit, ...]

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


def _fault(name: str, symptom: str, *edits: tuple[str, str, str]) -> Fault:
    return Fault(name, symptom, tuple(Edit(*edit) for edit in edits))


_ROWS, _SLICE, _LAUNCH = "cuda/cluster_rows.h", "cuda/slice.h", "cuda/launch.h"
_EXCHANGE, _SWEEPS = "cuda/exchange.h", "cuda/sweeps.h"
_ARRIVE = 'asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");'
_SENT = "*cluster.map_shared_rank(&exchange.parts[cluster.block_rank()], lane) = part;"
_X_TARGET = "exchange.parts[column / width].x_target"
_PEER = "cluster.map_shared_rank(&exchange, column / width)->parts[column / width].x_target"
_ALLOWED = "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)"
_LARGEST = "m = max_or_nan(m, __shfl_xor_sync(ALL_LANES, m, step));"
_HEAD = "shift != 0 ? min(n, (VECTOR_BYTES - shift) / static_cast<int>(sizeof *d_x)) : 0"
_READOUT = """\
if (threadIdx.x == 0) {
    exchange.readout = make_readout(
        rows.scale, rows.softcap, rows.row_temperature == nullptr ? rows.temperature : rows.row_temperature[row]);
  }
  __syncthreads();"""
_ALL_TOLD = """\
__syncwarp();
  // After this no block accesses another's memory, so a block may end at any time.
  cluster_arrive();"""
_LANDED = "wait_for_copies(COPY_GROUPS - 1 - group);\n    __syncthreads();"
_TOLD = "__syncthreads();\n  cluster_wait();"
_TERMS = "if (!Step::WRITES) return;\n  __syncthreads();"

FOUND = (
    _fault(
        "parts are sent before all blocks have started",
        "written before its block started",
        (_ROWS, "// may be outside of this block's slice\n  cluster_started();", ""),
        (_EXCHANGE, _TOLD, "__syncthreads();"),
    ),
    _fault(
        "parts are read before all blocks have sent theirs",
        "got nan|written after its block ended",
        (_EXCHANGE, _ALL_TOLD, "return;"),
    ),
    _fault(
        "parts are sent without a release",
        "got nan|written after its block ended",
        (_EXCHANGE, _ARRIVE, _ARRIVE.replace("release", "relaxed")),
    ),
    _fault("parts go to one block", "got nan", (_EXCHANGE, _SENT, _SENT.replace("lane)", "0)"))),
    _fault("parts go to no block", "no block of rank", (_EXCHANGE, _SENT, _SENT.replace("lane)", "lane + 1)"))),
    _fault("parts are mixed up", "got nan", (_EXCHANGE, _SENT, _SENT.replace("cluster.block_rank()", "lane"))),
    _fault("memory of a block that may have ended is read", "got nan", (_ROWS, _X_TARGET, f"({_PEER})")),
    _fault("the readout is read too early", "got nan", (_ROWS, _READOUT, _READOUT.removesuffix("__syncthreads();"))),
    _fault("sums of warps are read too early", "got nan", (_EXCHANGE, _TOLD, "cluster_wait();")),
    _fault("terms are read too early", "got nan", (_ROWS, _TERMS, "if (!Step::WRITES) return;")),
    _fault("copies of other threads are read too early", "got nan", (_SWEEPS, _LANDED, _LANDED.partition("\n")[0])),
    _fault(
        "copies are waited for a group too late",
        "got nan|copies were under way",
        (_SWEEPS, _LANDED, "wait_for_copies(min(COPY_GROUPS - group, COPY_GROUPS - 1)); __syncthreads();"),
    ),
    _fault(
        "fields are copied after the logits",
        "got nan|copies were under way",
        (_ROWS, "step.prepare(row, exchange);", ""),
        (_ROWS, "slice.copy(x);", "slice.copy(x); step.prepare(row, exchange);"),
    ),
    _fault("copies are not waited for", "copies were under way", (_ROWS, "wait_for_copies(0);", "")),
    _fault(
        "the target is read after it was overwritten",
        "exceeds",
        (_ROWS, _X_TARGET, "Format::widen(start_of<Format>(rows.logits, rows, row, 0)[y])"),
    ),
    _fault(
        "a part of the block passes a barrier by",
        "deadlock: .* 448 at __syncthreads .* 64 at their end",
        (_ROWS, _TERMS, "if (!Step::WRITES) return; if (threadIdx.x >= WARP) __syncthreads();"),
    ),
    _fault(
        "a barrier is not waited for",
        "arrives twice without a wait",
        (_EXCHANGE, _TOLD, "__syncthreads();"),
    ),
    _fault(
        "threads of a block meet at two barriers",
        "diverged: .*__syncthreads",
        (_ROWS, _TERMS, "if (!Step::WRITES) return; if (threadIdx.x < 7) __syncthreads();\n else __syncthreads();"),
    ),
    _fault(
        "lanes of a warp shuffle in two places",
        "diverged: .*__shfl_xor_sync",
        (_EXCHANGE, _LARGEST, f"if (threadIdx.x % 2 == 0) {_LARGEST}\n else {_LARGEST}"),
    ),
    _fault("vectors are read unaligned", "misaligned access", (_SLICE, "memory + at - offset", "memory + at")),
    _fault("vectors are written unaligned", "a store of 16 bytes is misaligned", (_SLICE, _HEAD, "0")),
    _fault("vectors are copied unaligned", "copy of 16 bytes is misaligned", (_SLICE, "misalignment(x)", "0")),
    _fault(
        "an array is read beyond its end", "index out of bounds", (_ROWS, _X_TARGET, _X_TARGET.replace("]", " + 16]"))
    ),
    _fault(
        "the memory of a slice ends too early",
        "written beyond its end",
        (_LAUNCH, "cut.width * bytes + Slice<Format>::SLACK", "cut.width * bytes"),
    ),
    _fault(
        "less memory is allowed than a launch takes",
        "the kernel's attribute allows 4096 bytes",
        (_LAUNCH, _ALLOWED, _ALLOWED.replace("bytes)", "4096)")),
    ),
    _fault(
        "more memory is allowed than a block has",
        "no block has 262144 bytes",
        (_LAUNCH, _ALLOWED, _ALLOWED.replace("bytes)", "262144)")),
    ),
)
"""What the tests find."""

HIDDEN = (
    # A thread arrives for itself here; the hardware wants all lanes of a warp to do so together.
    _fault("lanes arrive while others still send", "", (_EXCHANGE, _ALL_TOLD, "cluster_arrive();")),
)
"""What the emulator cannot find."""


def plant(faults: tuple[Fault, ...]) -> Change:
    """Compiles faults into the kernels; the k-th is there after the module's ``plant(k)``.

    The change raises ValueError where the sources do not have what a fault changes, once.
    """

    def change(path: Path, source: str) -> str:
        edits = [
            (number, edit) for number, fault in enumerate(faults) for edit in fault.edits if edit.file == str(path)
        ]
        for _, edit in edits:
            if source.count(edit.right) != 1:
                raise ValueError(f"{path} must have {edit.right!r} once, a fault changes it")
        for number, edit in edits:
            source = _edited(source, edit, number)
        return source

    return change


def _edited(source: str, edit: Edit, number: int) -> str:
    """Right and wrong beside each other. Of faults in one place each is in what is left right by those before."""
    planted = f"::emulator::planted_fault == {number}"
    if edit.right.endswith(";"):
        both = f"if ({planted}) {{ {edit.wrong} }} else {{ {edit.right} }}"
    else:
        both = f"({planted} ? ({edit.wrong}) : ({edit.right}))"
    before, _, after = source.rpartition(edit.right)
    return before + both + after
