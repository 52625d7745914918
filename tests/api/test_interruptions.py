"""Ctrl-C and the end of memory in the middle of a call: the error arrives, inputs are whole, the next call is right.

Each in a process of its own, since both concern all of it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT

SETUP = """
import os, resource, signal, sys, threading, time
import torch
import unirl_kernels as uk

torch.set_num_threads(1)
torch.manual_seed(0)
V, D, CHUNK = 8192, 64, 32
hidden, weight = torch.randn(4, 48, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
target = torch.randint(0, V, (4, 48))
batch = uk.Batch(target, torch.randn(4), None, -torch.rand(4, 48))
plan = uk.Plan("cpu", max_chunk_bytes=CHUNK * V * 4)
inputs = {"hidden": hidden, "weight": weight, "target": target, "advantage": batch.advantage, "ref": batch.ref_logp}
before = {name: x.detach().clone() for name, x in inputs.items()}

def statistics():
    stats = uk.linear_token_stats(hidden, weight, target, plan=plan)
    return [stats.logp.detach(), *torch.autograd.grad(stats.logp.sum(), (hidden, weight))]

def loss_of(loss):
    out = uk.fused_linear_loss(hidden, weight, batch, loss, plan=plan)
    return [out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))]

def logits():
    x = (hidden.detach() @ weight.detach().t()).requires_grad_()
    out = uk.fused_loss(x, batch, uk.grpo(), plan=uk.Plan("cpu"))
    return [out.loss.detach(), *torch.autograd.grad(out.loss, x)]

call = {
    "grpo": lambda: loss_of(uk.grpo()), "dpo": lambda: loss_of(uk.dpo()), "stats": statistics, "logits": logits
}[sys.argv[1]]

def whole():
    return all(torch.equal(x, before[name]) for name, x in inputs.items())

def same(found, expected):
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
"""

INTERRUPTED = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without it
expected = call()
began = time.monotonic()
call()
seconds = time.monotonic() - began
for part in range(1, 5):
    sent = threading.Event()

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    timer = threading.Timer(seconds * part / 5, interrupt)
    try:
        timer.start()
        while not sent.is_set():  # a call may be faster than the timed one
            call()
        time.sleep(0.1)
    except KeyboardInterrupt:
        timer.join()
    else:
        raise AssertionError("the interrupt was lost")
    assert whole(), "an input was changed"
    assert same(call(), expected), "the next call is wrong"
"""

WITHOUT_MEMORY = """
uk.fused_linear_loss(hidden[:, :1], weight[:9], uk.Batch(target[:, :1] % 9), uk.sft(), plan=plan)  # what is loaded once
failed, size = 0, weight.numel() * 4
for more in range(0, 40 * size, size // 4):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))
    try:
        found = call()
    except (RuntimeError, MemoryError) as error:
        message, found = f"{type(error).__name__}: {error}", None
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert whole(), "an input was changed"
    if found is not None:
        break
    assert "memory" in message or "bad_alloc" in message or message == "MemoryError: ", message
    failed += 1
assert found is not None, message
assert failed >= 3, f"{failed} calls failed"
assert same(call(), found), "the next call is wrong"
"""


def run(code: str, call: str, **variables: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SETUP + code, call]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("call", ["grpo", "dpo", "stats", "logits"])
def test_an_interrupt_at_any_moment(call: str) -> None:
    run(INTERRUPTED, call)


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited, and its size read, as on Linux")
@pytest.mark.parametrize("call", ["grpo", "dpo", "stats", "logits"])
def test_memory_that_ends_at_any_moment(call: str) -> None:
    """The call runs with more memory each time, until it succeeds, so that each of its allocations fails once."""
    run(WITHOUT_MEMORY, call, MALLOC_MMAP_THRESHOLD_="65536")
