"""What a call costs besides its kernels: Python calls, microseconds and, with valgrind, instructions.

    python benchmarks/call_overhead.py                 # about 20 s
    python benchmarks/call_overhead.py --instructions  # also counted by callgrind, some minutes

Each case is so small that its kernels take a microsecond or two. Calls are those that Python's profiler sees, of Python
functions and of C functions, forward and backward together; they repeat exactly, and so do instructions but for a few
in a thousand. Microseconds are minima, the two sides in turns, one thread.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("FASTGAN_CACHE", tempfile.mkdtemp(prefix="fastgan-overhead-"))

import torch
import torch.nn.functional as F
from torch import nn

import fastgan
from fastgan.benchmarking.timing import interleave

ROUNDS = 100  # of a case under callgrind
MARK = "getppid"  # a function of libc and of os that nothing else calls


def cases() -> dict[str, Callable[[], object]]:
    """name -> a forward, or a forward and backward pass; "torch ..." and "fastgan ..." in turns."""
    torch.manual_seed(0)
    found: dict[str, Callable[[], object]] = {}
    models = {
        "conv+bn+act": (nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)), (1, 8, 8, 8)),
        "bn1d+act": (nn.Sequential(nn.BatchNorm1d(64), nn.ReLU()), (16, 64)),
        "linear+act": (nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.2)), (4, 8)),
    }
    for name, (model, shape) in models.items():
        x = torch.randn(shape)
        for training in (False, True):
            plain = copy.deepcopy(model).train(training)
            for who, net in (("torch", plain), ("fastgan", fastgan.convert(copy.deepcopy(plain)))):
                found[f"{who} {name} {'training' if training else 'eval'}"] = _pass(net, x, training)
    fake, real = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
    found["torch gan_loss training"] = lambda: (F.softplus(-real).mean() + F.softplus(fake).mean()).backward()
    loss = fastgan.functional.gan_loss
    found["fastgan gan_loss training"] = lambda: loss(fake, real, kind="bce", side="d").backward()
    t, bias = torch.randn(1, 64), torch.randn(64)
    found["torch bias_act eval"] = lambda: F.leaky_relu(t + bias, 0.2)
    found["fastgan bias_act eval"] = lambda: fastgan.functional.bias_act(t, bias)
    return found


def _pass(net: nn.Module, x: torch.Tensor, training: bool) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return net(x)

    return (lambda: net(x).sum().backward()) if training else forward


def python_calls(run: Callable[[], object]) -> int:
    """Calls that Python's profiler sees in one run, the third."""
    run(), run()
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count - 1  # sys.setprofile itself


def instructions() -> dict[str, int]:
    """Of one run of each case, by callgrind, which writes down and forgets its counts wherever MARK is called."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--dump-before={MARK}", f"--callgrind-out-file={folder}/counts"]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        subprocess.run([*command, sys.executable, __file__, "--counted"], env=environment, check=True)
        texts = [Path(folder, f"counts.{2 * i}").read_text() for i in range(1, len(cases()) + 1)]
    totals = [int(re.search(r"^totals: (\d+)", text, re.MULTILINE).group(1)) for text in texts]  # type: ignore[union-attr]
    return {name: total // ROUNDS for name, total in zip(cases(), totals, strict=True)}


def run_counted() -> None:
    """Every case between two marks, once its first runs have made what is kept."""
    mark = getattr(os, MARK)
    with fastgan.racing(False):
        for run in cases().values():
            run(), run()
            mark()
            for _ in range(ROUNDS):
                run()
            mark()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", action="store_true", help="count them, too; valgrind must be installed")
    parser.add_argument("--counted", action="store_true", help="what --instructions runs under callgrind")
    args = parser.parse_args()
    if args.instructions and not shutil.which("valgrind"):
        parser.error("--instructions: valgrind must be installed, found none on the PATH")
    torch.set_num_threads(1)
    if args.counted:
        return run_counted()
    found = cases()
    timed = interleave(found, seconds=1.0 * len(found))
    print("| case | Python calls | us |" + (" instructions |" if args.instructions else ""))
    print("|---|---:|---:|" + ("---:|" if args.instructions else ""))
    counted = instructions() if args.instructions else {}
    for name, run in found.items():
        row = f"| {name} | {python_calls(run)} | {1e6 * timed[name].min:.1f} |"
        print(row + (f" {counted[name]:,} |" if args.instructions else ""), flush=True)


if __name__ == "__main__":
    main()
