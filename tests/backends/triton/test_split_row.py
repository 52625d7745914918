"""Programs of ``split_row`` at once: under the interpreter each in a process of its own, over shared memory."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from tests.backends.triton.rows import DEVICE, PLAIN, RESULTS, Rows, check, make_rows, run
from unirl_kernels.backends.groups import FusedRows
from unirl_kernels.backends.triton import geometry
from unirl_kernels.batch import IGNORE

SLICES = 3
VOCAB = 5120
SECONDS = 300
"""Longer than any wait for a processor that is busy with other tests."""


def one_program(rows: Rows, scratch: Tensor, results: Tensor) -> None:
    """Draw tickets until there are none. All programs share these tensors."""
    from unirl_kernels.backends.triton import launch

    torch.set_num_threads(1)
    launch._scratch = lambda records, device: scratch
    launch.rows_like = lambda target, dtype, n: list(results)
    geometry.programs = lambda *args, **kwargs: 1
    geometry.whole_row = lambda shape, vocab: shape
    geometry.SIZES = geometry.SIZES._replace(split_max_warps=1)
    run(rows, "split_row", "entropy", PLAIN, rows.logits)


def shared(x: Tensor) -> Tensor:
    return x.clone().share_memory_()


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU every test of split_row runs many programs at once")
def test_programs_that_wait_for_one_another() -> None:
    """In place, with as few programs as slices, of which the first is alone for a while."""
    rows = make_rows(VOCAB, shape=(1, 4))
    rows.target[0, 1] = IGNORE
    whole = run(rows, "two_sweep", "entropy")
    exact = run(Rows(rows.logits.double(), rows.target, rows.fields), "two_sweep", "entropy")
    scratch = shared(torch.zeros(1 + 4 * SLICES, 4, dtype=torch.int64))
    results = shared(torch.full((len(FusedRows._fields), 1, 4), torch.nan))
    logits = shared(rows.logits)
    seen = Rows(logits, shared(rows.target), {name: shared(f) for name, f in rows.fields.items()})
    context: Any = torch.multiprocessing.get_context("spawn")
    programs = [context.Process(target=one_program, args=(seen, scratch, results), daemon=True) for _ in range(SLICES)]
    try:
        programs[0].start()
        end = time.monotonic() + SECONDS
        while not scratch[1].all() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1)
        assert scratch[0, 0] == 1, "a program that is alone waits with a ticket that nobody else can serve"
        for program in programs[1:]:
            program.start()
        for program in programs:
            program.join(SECONDS)
        assert [program.exitcode for program in programs] == [0] * SLICES, "a program waits for ever, or failed"
    finally:
        for program in programs:
            if program.is_alive():
                program.kill()
    assert scratch[0, 0] == 4 * SLICES + SLICES, "every program ends with a ticket beyond the last row's"
    for name, split, plain, truth in zip(RESULTS, (*results, logits), whole, exact, strict=True):
        check(split, plain, truth, name, 10.0)
