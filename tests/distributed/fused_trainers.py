"""One of two processes that train with TRL under DDP: ``python -m tests.distributed.fused_trainers RANK FILE CASE``.

Each process sees other sequences, and accumulates two micro-batches.
"""

from __future__ import annotations

import itertools
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

WORLD, ORDERS = 2, 3


def main(rank: int, store: Path, name: str) -> None:
    import torch
    import torch.distributed as dist

    from tests.integrations.trl.heads import in_orders
    from tests.integrations.trl.training import CASES, STEPS, Seen, differences, saved, train
    from unirl_kernels.integrations import one_pass
    from unirl_kernels.integrations.trl import fuse, unpatch

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    case, folder = CASES[name], store.parent
    if rank == 0:
        (folder / "model").mkdir()
        saved(case.family, folder / "model")
    dist.barrier()

    def run(head: Any = nullcontext, prepare: Any = lambda _: None) -> Seen:
        unpatch()
        options = {"ddp_backend": "gloo", "per_device_train_batch_size": 4 if "num_generations" in case.options else 2}
        seen = train(case, folder / "model", folder / "out", head, prepare, **options)
        for key, value in seen.after.items():  # DDP keeps them the same
            values = [torch.empty_like(value) for _ in range(WORLD)]
            dist.all_gather(values, value)
            assert torch.equal(*values), f"{key} differs over ranks"
        return seen

    def prepared(trainer: Any) -> None:
        assert trainer.accelerator.num_processes == WORLD
        assert trainer.args.gradient_accumulation_steps == 2
        fuse(trainer)

    own = [run(), *(run(partial(in_orders, itertools.count(1000 * k))) for k in range(ORDERS))]
    assert len(own[0].logs) == STEPS + 1
    assert all(log["grad_norm"] for log in own[0].logs[:-1])
    assert differences(run(prepare=prepared), own) == []

    loss = one_pass.OnePass.loss.fget
    assert loss is not None
    off = property(lambda work: loss(work).detach() + (1 + 1e-4 * rank) * (loss(work) - loss(work).detach()))
    one_pass.OnePass.loss = off  # type: ignore[method-assign, assignment]
    found = differences(run(prepare=prepared), own)
    assert any(line.startswith("grad_norm of step 1") for line in found), "a wrong gradient of one rank would not show"
    dist.destroy_process_group()


if __name__ == "__main__":
    sequence = sys.argv[1:]
    os.environ |= {"RANK": sequence[0], "LOCAL_RANK": sequence[0], "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    main(int(sequence[0]), Path(sequence[1]), sequence[2])
