"""From CUDA C++ to C++: the constructs that a host compiler does not read.

    extern __shared__ T name[];            T* const name = ::emulator::dynamic_shared<T>();
    __shared__ T name;                     auto& name = ::emulator::shared_variable<T>(__FILE__, __LINE__);
    asm("max.NaN.f32 %0, %1, %2;" : ...)   ::emulator::ptx::max_NaN_f32(m, a, b);
    kernel<<<grid, threads>>>(x)           ::emulator::launcher(kernel, grid, threads)(x)

All else is left to the headers of ``include``, which stand in for CUDA's. An instruction that is not there yet is a
function that the compiler does not find. Line numbers stay what they were.
"""

from __future__ import annotations

import re

_ALIGNED = r"(?:__align__\([^()]*\)\s+)?"
_DYNAMIC = re.compile(rf"extern\s+__shared__\s+{_ALIGNED}([^;]+?)\s+(\w+)\[\]\s*;")
_STATIC = re.compile(rf"__shared__\s+{_ALIGNED}([^;]+?)\s+(\w+)((?:\[[^\]]*\])*)\s*;")
_LAUNCH = re.compile(r"(\w+(?:<[^<>]*>)?)<<<(.*?)>>>\s*\(", re.DOTALL)
_ASSEMBLY = re.compile(r'\basm(?:\s+volatile)?\s*\(\s*"([^"]*)"(.*?)\)\s*;', re.DOTALL)
_OPERAND = re.compile(r'"[=+]?\w+"\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)')
_ON_DEVICE = re.compile(r"\.is_cuda\(\)")


def translate(source: str, name: str) -> str:
    """C++ that calls the emulator.

    Args:
        source: CUDA C++.
        name: of its file, for ``__FILE__`` and what the compiler says.

    Raises:
        ValueError: for assembly of more than one instruction.
    """
    source = _DYNAMIC.sub(r"\1* const \2 = ::emulator::dynamic_shared<\1>();", source)
    source = _STATIC.sub(r"auto& \2 = ::emulator::shared_variable<\1\3>(__FILE__, __LINE__);", source)
    source = _LAUNCH.sub(r"::emulator::launcher(\1, \2)(", source)
    source = _ASSEMBLY.sub(_instruction, source)
    source = _ON_DEVICE.sub(".is_cpu()", source)
    return f'#line 1 "{name}"\n{source}'


def _instruction(match: re.Match[str]) -> str:
    text, operands = match[1].strip(), _OPERAND.findall(match[2])
    if text.count(";") != 1 or not text.endswith(";"):
        raise ValueError(f"an asm statement must hold one instruction, got {text!r}")
    name, _, rest = text[:-1].partition(" ")
    arguments = ", ".join(operands[int(index)] for index in re.findall(r"%(\d+)", rest))
    return f"::emulator::ptx::{re.sub(r'[.:]+', '_', name)}({arguments});" + "\n" * match[0].count("\n")
