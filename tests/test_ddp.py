"""Converted hand-written models in DistributedDataParallel: two processes give the gradients of the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import end_with_this

import fastgan

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

# The models take no statistics over the batch, so that the mean of two halves' gradients is the whole batch's.
WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastgan
from handwritten import PatchGAN, SNDiscriminator, Vocoder

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
torch.set_num_threads(1)
fastgan.racing(False)
cases = {
    "patchgan": (PatchGAN, lambda: [torch.randn(4, 3, 32, 32) for _ in range(2)]),
    "vocoder": (Vocoder, lambda: [torch.randn(4, 20, 6)]),
    "sngan": (lambda: SNDiscriminator(wrap=lambda m: m), lambda: [torch.randn(4, 3, 16, 16)]),
}
for name, (make, draw) in cases.items():
    torch.manual_seed(0)
    plain = make().double()
    inputs = [x.double() for x in draw()]
    plain(*inputs).square().sum().div(2).backward()
    want = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    model = DistributedDataParallel(fastgan.convert(plain))
    for _ in range(3):  # traced, then past the tracing
        model.zero_grad()
        model(*(x[2 * rank : 2 * rank + 2] for x in inputs)).square().sum().backward()
        for p, w in zip(plain.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, w, rtol=1e-9, atol=1e-11)
    ran = sum(graph.calls for graph in plain.forward.graphs)
    print(name, "traced" if ran >= 3 else f"not traced: {ran}")
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_the_whole_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    paths = [str(Path(__file__).parent), str(Path(fastgan.__file__).parent.parent)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    call = lambda rank: [sys.executable, "-W", "ignore", "-c", WORKER, str(rank), address]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": end_with_this}
    workers = [subprocess.Popen(call(rank), env=env, **options) for rank in range(2)]
    for worker in workers:
        said, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
        assert said.split() == ["patchgan", "traced", "vocoder", "traced", "sngan", "traced"]
