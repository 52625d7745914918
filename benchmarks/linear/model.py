"""What a linear head is predicted to take on a GPU, from its chunks: ``python -m benchmarks.linear.model``.

    time = three matmuls, in waves of tiles + traffic of the row kernel and of fp32 sums, beside them

Matmuls run at the rate of the device times the share of the last wave that is used. What they write counts as hidden
behind them, but for what fp32 results have more than results of 16 bits. Nothing of it is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from unirl_kernels.head.chunks import DEFAULT_CHUNK_BYTES_OF_ACCELERATORS
from unirl_kernels.head.sizes import TILE, Shape, Sizes, sizes_of, waves

ROW_KERNEL = 0.9
"""The part of a copy's bandwidth that row kernels are predicted to reach."""


class Device(NamedTuple):
    multiprocessors: int
    copy: float  # bytes per second
    flops: float  # of large matmuls, per second


DEVICES = {"H100": Device(132, 3.0e12, 720e12), "H200": Device(132, 4.3e12, 720e12)}
SHAPES = ((4096, 4096, 128256), (8192, 3584, 152064), (8192, 2048, 128256), (8192, 4096, 131072), (16384, 2560, 262208))
"""T, D, V."""


class Prediction(NamedTuple):
    seconds: float
    floor: float  # of three matmuls at the device's rate
    bytes: int  # beyond operands and gradients

    @property
    def share(self) -> float:
        return self.floor / self.seconds


def chosen(device: Device, tokens: int, d: int, vocab: int) -> Sizes:
    """The sizes that the package takes."""
    memory = DEFAULT_CHUNK_BYTES_OF_ACCELERATORS
    found = sizes_of(Shape(tokens, vocab, d, 4 * vocab, 2 * vocab, memory, device.multiprocessors))
    assert found is not None
    return found


def predict(device: Device, tokens: int, d: int, vocab: int, sizes: Sizes | None = None) -> Prediction:
    """Loss and gradients of bf16 hidden states and weight.

    Args:
        device: see ``DEVICES``.
        tokens: T.
        d: size of a hidden state.
        vocab: V.
        sizes: of chunks and groups; None for those that are chosen.
    """
    processors = device.multiprocessors
    sizes = sizes or chosen(device, tokens, d, vocab)

    def matmul(rows: int, columns: int, depth: int) -> float:
        per_wave = 2 * TILE[0] * TILE[1] * depth * processors / device.flops
        return waves(rows, columns, processors) * per_wave

    seconds, traffic = 0.0, 0.0
    groups = list(_spans(tokens, sizes.group))
    for of_group in groups:
        for chunk in _spans(of_group, sizes.chunk):
            seconds += matmul(chunk, vocab, d)
            traffic += 2 * chunk * vocab + 6 * chunk * vocab / ROW_KERNEL  # fp32 results; read as such, written in bf16
        seconds += matmul(of_group, d, vocab) + matmul(vocab, d, of_group)
        traffic += (2 + 4 + 2) * of_group * d  # d_hidden in fp32, converted
    sums = 4 * vocab * d if len(groups) > 1 else 0
    traffic += (2 * len(groups) - 1) * sums + 1.5 * sums  # read and written by each group, converted at the end
    held = 4 * vocab * min(sizes.chunk, tokens) + 2 * vocab * max(groups) + sums + 6 * d * max(groups)
    return Prediction(seconds + traffic / device.copy, 6 * tokens * d * vocab / device.flops, held)


def before(tokens: int, vocab: int) -> Sizes:
    """One size for logits and gradients, 6 bytes each, in 2 GiB."""
    chunks = -(-tokens // (2**31 // (6 * vocab)))
    rows = -(-tokens // chunks)
    return Sizes(rows, rows)


def _spans(n: int, most: int) -> Iterator[int]:
    for start in range(0, n, most):
        yield min(most, n - start)


def main() -> None:
    print("| T x D x V | device | groups | GB beyond | ms | of three matmuls | before |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for tokens, d, vocab in SHAPES:
        for name, device in DEVICES.items():
            groups = -(-tokens // chosen(device, tokens, d, vocab).group)
            found = predict(device, tokens, d, vocab)
            old = predict(device, tokens, d, vocab, before(tokens, vocab))
            size = f"{tokens} x {d} x {vocab} | {name} | {groups} | {found.bytes / 1e9:.1f}"
            was = f"{old.share:.0%}, {old.bytes / 1e9:.1f} GB"
            print(f"| {size} | {1e3 * found.seconds:.1f} | {found.share:.0%} | {was} |")


if __name__ == "__main__":
    main()
