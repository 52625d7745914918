"""CUDA C++ becomes C++ that calls the emulator."""

from __future__ import annotations

import pytest

from tests.backends.cuda.emulator.translate import translate

EXAMPLES = {
    "extern __shared__ __align__(16) unsigned char memory[];": (
        "unsigned char* const memory = ::emulator::dynamic_shared<unsigned char>();"
    ),
    "__shared__ Exchange exchange;": ("auto& exchange = ::emulator::shared_variable<Exchange>(__FILE__, __LINE__);"),
    "__shared__ float sums[8][WARP];": (
        "auto& sums = ::emulator::shared_variable<float[8][WARP]>(__FILE__, __LINE__);"
    ),
    "multiply<Float32><<<blocks, THREADS, 0, stream>>>(x, by);": (
        "::emulator::launcher(multiply<Float32>, blocks, THREADS, 0, stream)(x, by);"
    ),
    'asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(f(a, b)), "f"(c));': (
        "::emulator::ptx::max_NaN_f32(result, f(a, b), c);"
    ),
    'asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(low), "f"(high));': (
        "::emulator::ptx::cvt_rn_bf16x2_f32(word, high, low);"
    ),
    'asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");': (
        "::emulator::ptx::barrier_cluster_arrive_release_aligned();"
    ),
    "x[0] = a << b;": "x[0] = a << b;",
}


@pytest.mark.parametrize("source", EXAMPLES)
def test_constructs(source: str) -> None:
    assert translate(source, "csrc/x.cu") == f'#line 1 "csrc/x.cu"\n{EXAMPLES[source]}'


def test_lines_stay_where_they_are() -> None:
    source = 'int f() {\n  asm("max.f32 %0, %1, %2;"\n      : "=f"(x)\n      : "f"(a), "f"(b));\n  g();\n}\n'
    assert translate(source, "x").splitlines().index("  g();") == source.splitlines().index("  g();") + 1


def test_several_instructions_are_refused() -> None:
    with pytest.raises(ValueError, match="must hold one instruction"):
        translate('asm("add.f32 %0, %1, %2; mul.f32 %0, %0, %0;" : "=f"(x) : "f"(a), "f"(b));', "x")
