"""Which precision a step computes in: "auto" takes bfloat16 where this machine is faster in it, float32 elsewhere."""

from __future__ import annotations

import functools
import sys
import time
from typing import NamedTuple

import torch

from fastgan._op import OPS
from fastgan.choice import native, remember_fact, remembered_fact

NAMES = ("auto", "fp32", "bf16", "fp16")
FAST_TABLES = {"avx512_bf16": "AVX-512 BF16", "amx": "AMX"}  # of the native core, with products of bfloat16
LEAST = 1.1  # the gain in the layer's time that is worth the lower precision


class Precision(NamedTuple):
    """name: "fp32", "bf16" or "fp16"; why: in a few words, "" where the user named it; slower: a warning, or ""."""

    name: str
    why: str = ""
    slower: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


def resolve(precision: str, device: torch.device) -> Precision:
    """What `precision` means on `device`.

    precision: "auto", "fp32", "bf16" or "fp16"; what is named is taken.
    """
    if precision == "auto":
        return _on_gpu(device) if device.type == "cuda" else _on_cpu(torch.get_num_threads())
    if precision == "bf16" and device.type == "cpu" and (lacking := _lacking()):
        return Precision(precision, slower=f"precision bf16 is slower than fp32 here: {lacking}")
    return Precision(precision)


@functools.cache
def warn(line: str) -> None:
    """One line, once a process."""
    print(f"fastgan: {line}", file=sys.stderr, flush=True)


def _on_gpu(device: torch.device) -> Precision:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 0):
        return Precision("bf16", f"auto: this GPU (sm_{major}{minor}) multiplies bf16 in tensor cores")
    return Precision("fp32", f"auto: this GPU (sm_{major}{minor}) has no tensor cores for bf16")


def _on_cpu(threads: int) -> Precision:
    """By the instructions first; where they are there, by a layer timed in both, which the cache remembers."""
    lacking = _lacking()
    if lacking:
        return Precision("fp32", f"auto: {lacking}")
    case = ("precision", "bf16 over fp32", threads)
    known = remembered_fact(case)
    gain = float(known) if known else round(bf16_gain(), 2)
    if known is None:
        remember_fact(case, str(gain))
    module, _ = native()
    instructions = FAST_TABLES[module.table()] if module else ""
    chosen = "bf16" if gain >= LEAST else "fp32"
    return Precision(chosen, f"auto: {instructions} runs a layer's forward and weight gradient {gain:g} times as fast")


def _lacking() -> str:
    """Why bfloat16 products are slow on this CPU, or ""."""
    module, reason = native()
    if module is None:
        return reason
    table = module.table()
    return "" if table in FAST_TABLES else f"this CPU has no instructions for bf16 products (kernels: {table})"


def bf16_gain(rounds: int = 7) -> float:
    """float32's time over bfloat16's, of the third layer of DCGAN-64's discriminator at batch 16, on our kernels.

    The best of `rounds` in turns; 0.1 s on two cores.
    """
    best: dict[torch.dtype, float] = {}
    for _ in range(rounds):
        for dtype in (torch.float32, torch.bfloat16):
            took = _layer_seconds(dtype)
            best[dtype] = min(best.get(dtype, took), took)
    return best[torch.float32] / best[torch.bfloat16]


def _layer_seconds(dtype: torch.dtype) -> float:
    channels_last = torch.channels_last
    x, weight, dy = (
        torch.ones(shape, dtype=dtype).contiguous(memory_format=channels_last)
        for shape in ((16, 128, 16, 16), (256, 128, 4, 4), (16, 256, 8, 8))
    )
    geometry = [2, 2], [1, 1], [1, 1], 1
    begin = time.perf_counter()
    OPS["conv2d"].backends["native"].run(x, weight, None, *geometry, "identity", 0.0)
    OPS["conv2d_weight"].backends["native"].run(x, dy, [4, 4], *geometry, True)
    return time.perf_counter() - begin
