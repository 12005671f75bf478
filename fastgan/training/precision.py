"""Which precision a step computes in: "auto" takes bfloat16 where this machine is faster in it, float32 elsewhere."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

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


def resolve(precision: str, device: torch.device, networks: Iterable[nn.Module]) -> Precision:
    """What `precision` means on `device`.

    precision: "auto", "fp32", "bf16" or "fp16"; what is named is taken. networks: those that are to be trained; "auto"
    goes by the kind of layer that they spend their time in (`layer_of`).
    """
    if precision == "auto":
        return _on_gpu(device) if device.type == "cuda" else _on_cpu(torch.get_num_threads(), layer_of(networks))
    if precision == "bf16" and device.type == "cpu" and (lacking := lacks_bf16()):
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


def layer_of(networks: Iterable[nn.Module]) -> str:
    """The kind of layer, a name in LAYERS, that these networks spend their time in.

    It is the kind of convolution that has most weights, since each is used at every place; where there is none, a
    linear layer; a 2-D convolution where nothing is known.
    """
    weights = dict.fromkeys(LAYERS, 0)
    for m in (m for network in networks for m in network.modules()):
        for name, layer in LAYERS.items():
            if isinstance(m, layer.kinds):
                weights[name] += sum(p.numel() for p in m.parameters())
    most = max(("conv2d", "conv1d"), key=lambda name: weights[name])
    return "linear" if weights["linear"] and not weights[most] else most


def _on_cpu(threads: int, layer: str) -> Precision:
    """By the instructions first; where they are there, by a layer timed in both, which the cache remembers."""
    lacking = lacks_bf16()
    if lacking:
        return Precision("fp32", f"auto: {lacking}")
    case = ("precision", "bf16 over fp32", layer, threads)
    known = remembered_fact(case)
    gain = float(known) if known else round(bf16_gain(layer), 2)
    if known is None:
        remember_fact(case, str(gain))
    module, _ = native()
    instructions = FAST_TABLES[module.table()] if module else ""
    chosen = "bf16" if gain >= LEAST else "fp32"
    what = f"{LAYERS[layer].words}'s forward and weight gradient"
    return Precision(chosen, f"auto: {instructions} runs {what} {gain:g} times as fast")


def lacks_bf16() -> str:
    """Why bfloat16 products are slow on this CPU, or ""."""
    module, reason = native()
    if module is None:
        return reason
    table = module.table()
    return "" if table in FAST_TABLES else f"this CPU has no instructions for bf16 products (kernels: {table})"


def bf16_gain(layer: str = "conv2d", rounds: int = 7) -> float:
    """float32's time over bfloat16's, of a layer of LAYERS on the kernels that a step has for it.

    The best of `rounds` in turns; up to 0.1 s on two cores.
    """
    best: dict[torch.dtype, float] = {}
    for _ in range(rounds):
        for dtype in (torch.float32, torch.bfloat16):
            took = _layer_seconds(LAYERS[layer], dtype)
            best[dtype] = min(best.get(dtype, took), took)
    return best[torch.float32] / best[torch.bfloat16]


class Timed(NamedTuple):
    """A layer that stands for its kind: the modules, what it is called, and the shapes of x, weight and y.

    step: (stride, padding) of a convolution, or None for a product of matrices, which is torch's own.
    """

    kinds: tuple[type[nn.Module], ...]
    words: str
    shapes: tuple[tuple[int, ...], ...]
    step: tuple[list[int], list[int]] | None


LAYERS = {
    # the third layer of DCGAN-64's discriminator at batch 16
    "conv2d": Timed(
        (nn.Conv2d, nn.ConvTranspose2d),
        "a 2-D convolution",
        ((16, 128, 16, 16), (256, 128, 4, 4), (16, 256, 8, 8)),
        ([2, 2], [1, 1]),
    ),
    # the second layer of chargan's residual blocks at batch 64: products of 5 taps and 64 channels
    "conv1d": Timed(
        (nn.Conv1d, nn.ConvTranspose1d),
        "a 1-D convolution",
        ((64, 64, 1, 24), (64, 64, 1, 5), (64, 64, 1, 24)),
        ([1, 1], [0, 2]),
    ),
    # the second layer of mlp-28's generator at batch 64
    "linear": Timed((nn.Linear,), "a linear layer", ((64, 256), (512, 256), (64, 512)), None),
}


def _layer_seconds(layer: Timed, dtype: torch.dtype) -> float:
    x, weight, dy = (torch.ones(shape, dtype=dtype) for shape in layer.shapes)
    if layer.step is None:
        begin = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        torch.mm(dy.t(), x)
        return time.perf_counter() - begin
    x, weight, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, dy))
    geometry = *layer.step, [1, 1], 1
    begin = time.perf_counter()
    OPS["conv2d"].backends["native"].run(x, weight, None, *geometry, "identity", 0.0)
    OPS["conv2d_weight"].backends["native"].run(x, dy, list(weight.shape[2:]), *geometry, True)
    return time.perf_counter() - begin
