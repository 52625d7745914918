"""Compiles the Triton kernels for GPUs that are not here, and reads from the machine code what they would use.

    python -m tests.backends.triton.cubins OPTION

    --measure [VARIANT ...]     print the numbers of these variants, or of all, as JSON
    --write                     make them the committed budgets
    --keys                      print what compiled kernels are keyed on, for different batches
    --polls SLICES [...]        print how threads of split_row share what they poll, by the number of slices

Runs in a process of its own: under Triton's interpreter nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

BUDGETS = Path(__file__).with_name("cubin_budgets.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
VOCABULARIES = {"vectors": 151936, "odd": 151669}
"""Rows of whole 16-byte vectors, and rows that start anywhere. V otherwise changes no compiled kernel."""

LAUNCHED = {
    "statistics": "measure",
    "observations": "measure",
    "two_sweep": "one_pass",
    "split_row": "one_pass",
}
"""What ``launch`` calls the kernels that do more than one thing."""

HELD_128_REGISTERS = 200
"""Four programs of two warps then share a multiprocessor, since a quarter of its registers holds two such warps."""


@dataclass(frozen=True)
class Variant:
    kernel: str
    architecture: str
    dtype: str
    rows: str
    objective: str = "grpo"
    readout: str = "linear"
    gradient: str = ""
    size: str = ""  # "wide": two_sweep with 16 warps; "held128": split_row with 128 held elements and 2 warps
    slices: int = 0  # of split_row; 0: as many as the row fills

    @property
    def is_plain(self) -> bool:
        """Aligned rows, the usual loss, nothing rounded."""
        return self == Variant(self.kernel, self.architecture, self.dtype, "vectors")

    def __str__(self) -> str:
        """What is as usual has no name: the loss, the readout, a gradient of the logits' dtype."""
        gradient = self.gradient and f"to_{self.gradient}"
        kind = (self.rows, self.objective, self.readout, gradient, self.size)
        parts = (self.kernel, self.architecture, self.dtype, *kind)
        return "-".join(part for part in parts if part not in ("grpo", "linear", ""))


def variants() -> list[Variant]:
    """Every kernel on every architecture, dtype and kind of rows, in fp64 on one of them; the costlier programs on one
    dtype; gradients that are rounded for the matmuls of linear heads; and tiles of other sizes."""
    every = [
        Variant(kernel, architecture, dtype, rows)
        for kernel in ("statistics", "observations", "backward", "two_sweep", "split_row", "scale")
        for architecture in ARCHITECTURES
        for dtype in ("fp32", "bf16", "fp16")
        for rows in VOCABULARIES
    ]
    exact = [
        Variant(kernel, "sm_90", "fp64", rows)
        for kernel in ("statistics", "observations", "backward", "two_sweep", "split_row", "scale")
        for rows in VOCABULARIES
    ]
    costly = [
        Variant(kernel, architecture, "bf16", "vectors", objective, readout)
        for kernel in ("two_sweep", "split_row")
        for architecture in ("sm_80", "sm_90", "sm_100")
        for objective, readout in (("entropy", "linear"), ("grpo", "softcap"))
    ]
    rounded = [
        Variant(kernel, architecture, "fp32", rows, gradient="bf16")
        for kernel in ("backward", "two_sweep", "split_row")
        for architecture in ARCHITECTURES
        for rows in VOCABULARIES
    ]
    resized = [
        Variant(kernel, architecture, dtype, rows, size=size)
        for kernel, size, dtypes in (("two_sweep", "wide", ("bf16", "fp32")), ("split_row", "held128", ("bf16",)))
        for architecture in ("sm_90", "sm_100")
        for dtype in dtypes
        for rows in VOCABULARIES
    ]
    return every + exact + costly + rounded + resized


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses.

    Args:
        registers: per thread.
        spilled: bytes of stack per thread (gfx942: vector registers spilled).
        wide_loads, wide_stores: 16-byte global accesses in the code.
        narrow_loads, narrow_stores: the others: a row's scalars, the edges of an unaligned row.
        exp2: exponentials in the code; a sweep holds its loop and its tail.
        sums: layouts of the sums over a row's columns, which decide its bits.
        threads: elements per thread, and threads per warp, along the dimensions of the tiles it holds and accesses.
    """

    registers: int
    spilled: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    exp2: int
    sums: tuple[str, ...]
    threads: tuple[tuple[tuple[int, ...], ...], ...]


def _entropy_bonus(t: Any) -> Any:
    ratio = torch.exp(t.logp - t.old_logp)
    return -torch.minimum(ratio * t.advantage, ratio.clamp(0.8, 1.2) * t.advantage) - 0.01 * t.entropy


def _program(objective: str) -> str:
    """Text of the program of an objective."""
    import unirl_kernels as uk
    from unirl_kernels.program import trace

    return trace([_entropy_bonus if objective == "entropy" else uk.grpo().objective]).text


def tile_of(variant: Variant) -> Any:
    """The ``geometry.Tile`` of a variant."""
    from unirl_kernels.backends.triton import geometry

    dtype, vocab = DTYPES[variant.dtype], VOCABULARIES[variant.rows]
    warp_size = 32 if variant.architecture.startswith("sm_") else 64
    if variant.size == "held128":
        shape = geometry._fill(dtype, vocab, warp_size, 2, 128 * dtype.itemsize // geometry.VECTOR_BYTES)
    elif variant.size == "wide":
        shape = geometry._fill(dtype, vocab, warp_size, geometry.SIZES.wide_warps, geometry.SIZES.vectors_in_flight)
    elif variant.kernel == "split_row":
        shape = geometry.slice_tile(dtype, vocab, variant.readout, warp_size)
    else:
        shape = geometry.tile(dtype, vocab, warp_size)
    return shape._replace(aligned=variant.rows == "vectors")


def constants_of(variant: Variant) -> dict[str, Any]:
    """Arguments that are known when a kernel is compiled."""
    from unirl_kernels.backends.groups import RowObservations
    from unirl_kernels.backends.triton import geometry
    from unirl_kernels.backends.triton.lowering import device_function
    from unirl_kernels.program import parsed

    shape, text = tile_of(variant), _program(variant.objective)
    vocab = variant.slices * shape.columns or VOCABULARIES[variant.rows]
    program = parsed(text)
    return {
        "OBJECTIVE": device_function(text),
        "FIELDS": program.n_fields,
        "ENTROPY": program.has_entropy_gradient,
        "READOUT": variant.readout,
        "TILE": shape,
        "SHAPE": geometry.split(shape, vocab) if variant.kernel == "split_row" else shape,
        "row_temperature": None,
        **({"scratch": None} if variant.kernel == "two_sweep" else {}),
        **(dict.fromkeys(RowObservations._fields) if variant.kernel == "statistics" else {}),
    }


def types_of(variant: Variant) -> dict[str, str]:
    """Types of the pointers that are not to fp32."""
    typed = dict.fromkeys(("logits", "x"), f"*{variant.dtype}")
    typed |= {"d_logits": f"*{variant.gradient or variant.dtype}"}
    if variant.dtype == "fp64":
        stats, moments = ("logp", "entropy", "lse"), ("top", "s_minus_1", "sz", "u_target")
        observations = ("log_sum_sq_probs", "mean_logit", "largest")
        typed |= dict.fromkeys(("loss", "fields", *stats, *moments, *observations), "*fp64")
    return typed | {"target": "*i64", "argmax": "*i64", "parameters": "*fp64", "scratch": "*i64"}


def compile_variant(variant: Variant) -> Any:
    """The compiled kernel, as ``launch`` would have it compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from unirl_kernels.backends.triton import geometry, launch

    constants, typed = constants_of(variant), types_of(variant)
    nvidia = variant.architecture.startswith("sm_")
    options: dict[str, Any] = dict(launch.OPTIONS)
    if variant.kernel == "split_row" and nvidia:
        capability = divmod(int(variant.architecture[3:]), 10)
        plain = variant.rows == "vectors" and not constants["ENTROPY"]
        options["maxnreg"] = geometry.held_registers(DTYPES[variant.dtype], capability, plain=plain)
        if variant.size == "held128":
            options["maxnreg"] = HELD_128_REGISTERS
    kernel = getattr(launch, LAUNCHED.get(variant.kernel, variant.kernel))
    signature, constexprs = {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
            constexprs[i,] = constants[parameter.name]
        else:
            signature[parameter.name] = parameter.annotation_type or typed.get(parameter.name, "*fp32")
    target = (
        GPUTarget("cuda", int(variant.architecture[3:]), 32) if nvidia else GPUTarget("hip", variant.architecture, 64)
    )
    source = ASTSource(kernel, signature=signature, constexprs=constexprs)
    return triton.compile(source, target=target, options={"num_warps": constants["TILE"].num_warps, **options})


def measure(variant: Variant) -> Usage:
    compiled = compile_variant(variant)
    numbers = _of_cubin(compiled.asm["cubin"]) if "cubin" in compiled.asm else _of_amdgcn(compiled.asm["amdgcn"])
    ttgir = compiled.asm["ttgir"]
    return Usage(*numbers, _sums(ttgir), _threads(ttgir, tile_of(variant)))


def _layouts(ttgir: str) -> dict[str, str]:
    return dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))


def _threads(ttgir: str, shape: Any) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """(sizePerThread, threadsPerWarp) of tiles: [unroll, lanes, vector]; as accessed; the same in 8-byte units."""
    layouts = _layouts(ttgir)
    row = (f"{shape.lanes}x{shape.vector}", f"{shape.lanes * shape.vector}", f"{shape.lanes * 2}")
    tile = rf"tensor<(?:{shape.unroll}|{shape.unroll // 2})x(?:{'|'.join(row)})x[^x,]*, (#\w+)>"

    def numbers(name: str, key: str) -> tuple[int, ...]:
        return tuple(map(int, re.search(rf"{key} = \[([\d, ]+)\]", layouts[name])[1].split(",")))

    names = set(re.findall(tile, ttgir))
    return tuple(sorted({(numbers(name, "sizePerThread"), numbers(name, "threadsPerWarp")) for name in names}))


def polls(slices: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(shape, elements that all threads hold together) of what ``split_row`` polls, along each dimension."""
    ttgir = compile_variant(Variant("split_row", "sm_90", "bf16", "vectors", slices=slices)).asm["ttgir"]
    layouts, found = _layouts(ttgir), []
    for shape, name in re.findall(r"isVolatile = true\} : tensor<([\dx]+)x!tt.ptr<i64>, (#\w+)>", ttgir):
        keys = ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
        spread = [map(int, re.search(rf"{key} = \[([\d, ]+)\]", layouts[name])[1].split(",")) for key in keys]
        found.append((tuple(map(int, shape.split("x"))), tuple(map(math.prod, zip(*spread, strict=True)))))
    return found


def _sums(ttgir: str) -> tuple[str, ...]:
    """Types of the tensors that are reduced, layouts spelled out, in the order of the code."""
    layouts = _layouts(ttgir)
    operands = re.findall(r'"tt\.reduce".*?\}\) : \((tensor<[^)]*>)\) ->', ttgir, re.DOTALL)
    return tuple(re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), operand) for operand in operands)


def _of_cubin(cubin: bytes) -> tuple[int, ...]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    registers, stack = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    found = Counter(re.findall(r"\b(LDG\.E[\w.]*|STG\.E[\w.]*|LDL[\w.]*|STL[\w.]*|MUFU\.EX2)", sass))

    def count(name: str, *, wide: bool) -> int:
        return sum(n for op, n in found.items() if op.startswith(name) and (".128" in op) == wide)

    spilled = stack + count("LDL", wide=False) + count("STL", wide=False)
    loads, stores = (count(op, wide=True) for op in ("LDG", "STG")), (count(op, wide=False) for op in ("LDG", "STG"))
    (wide_loads, wide_stores), (narrow_loads, narrow_stores) = loads, stores
    return registers, spilled, wide_loads, narrow_loads, wide_stores, narrow_stores, found["MUFU.EX2"]


def _of_amdgcn(assembly: str) -> tuple[int, ...]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    found = Counter(re.findall(r"\b((?:global|buffer)_(?:load|store)_\w+)", assembly))

    def count(name: str, *, wide: bool) -> int:
        return sum(n for op, n in found.items() if f"_{name}_" in op and op.endswith("x4") == wide)

    spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
    wide = {name: count(name, wide=True) for name in ("load", "store")}
    narrow = {name: count(name, wide=False) for name in ("load", "store")}
    exp2 = len(re.findall(r"\bv_exp_f32", assembly))
    return number("vgpr_count"), spilled, wide["load"], narrow["load"], wide["store"], narrow["store"], exp2


def measure_all(names: list[str]) -> dict[str, dict[str, Any]]:
    """Usage by variant: of the named ones, or of all."""
    chosen = [v for v in variants() if not names or str(v) in names]
    workers = min(4, os.cpu_count() or 1, len(chosen))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return {str(v): asdict(u) for v, u in zip(chosen, pool.map(measure, chosen, chunksize=2), strict=True)}


def write(usage: dict[str, dict[str, Any]]) -> None:
    """Make these numbers the budgets, one line per variant."""
    import triton

    numbers = {name: {k: v for k, v in used.items() if k not in ("sums", "threads")} for name, used in usage.items()}
    lines = [
        f"  {json.dumps(name)}: {json.dumps(value)}"
        for name, value in {"triton": triton.__version__, **numbers}.items()
    ]
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--measure", nargs="*", metavar="VARIANT")
    what.add_argument("--write", action="store_true")
    what.add_argument("--keys", action="store_true")
    what.add_argument("--polls", nargs="+", type=int, metavar="SLICES")
    args = parser.parse_args()
    if unknown := set(args.measure or ()) - set(map(str, variants())):
        parser.error(f"no such variants: {', '.join(sorted(unknown))}")
    if args.keys:
        from tests.backends.triton.launch_keys import keys

        print(json.dumps(keys()))  # noqa: T201
    elif args.polls:
        print(json.dumps([polls(slices) for slices in args.polls]))  # noqa: T201
    elif args.write:
        write(measure_all([]))
    else:
        print(json.dumps(measure_all(args.measure)))  # noqa: T201


if __name__ == "__main__":
    main()
