"""Other people's networks: `fastgan.convert` beside plain PyTorch, both in NCHW and in channels_last.

    python benchmarks/models.py                           # this machine's own instructions
    python benchmarks/models.py --table avx2              # both held to AVX2
    python benchmarks/models.py --only "sngan-32 step" vocoder  # some rows; the others stay as they are in the file

Three rows are whole training steps of the hand-written networks in examples/, at the sizes named there: the same loop
with fused Adam for every arm, the networks converted or not. The other rows are the networks of tests/handwritten.py,
forward and backward in training. The arms run in turns in one process; figures are medians. The races are over before
the clock starts: an unlimited account pays for them. Results go into one JSON a machine and table, row by row, so that
the work can be done in parts; benchmarks/report.py makes the page of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("FASTGAN_CACHE", tempfile.mkdtemp(prefix="fastgan-models-"))

import facts
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastgan
from fastgan.benchmarking import table
from fastgan.benchmarking.timing import interleave
from fastgan.choice import STATE
from fastgan.choice.budget import unlimited

sys.path += [str(facts.ROOT / "examples"), str(facts.ROOT / "tests")]
import handwritten
import pix2pix
import residual_sngan
import vocoder

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UP = {"step": 20, "network": 64}  # calls: tracing and races, which these calls are, end in them
BATCH = 16  # of the tests' networks


# ---- whole steps ----------------------------------------------------------------------------------------------------


def sngan() -> tuple[Any, ...]:
    networks = residual_sngan.Generator(64), residual_sngan.Discriminator(64)
    inputs = torch.rand(32, 3, 32, 32) * 2 - 1, torch.randn(32, residual_sngan.LATENT)
    return networks, inputs, residual_sngan.train_step


def unet() -> tuple[Any, ...]:
    networks = pix2pix.UNet(16, 256), pix2pix.PatchGAN(16)
    inputs = tuple(torch.rand(16, 3, 256, 256) * 2 - 1 for _ in range(2))
    return networks, inputs, pix2pix.train_step


def sound() -> tuple[Any, ...]:
    networks = vocoder.Generator(128), vocoder.Discriminators(32)
    real = vocoder.tones(16, 8192, torch.Generator().manual_seed(0))
    return networks, (real, vocoder.spectrogram(real)), vocoder.train_step


STEPS = {  # name -> (what builds it, batch, what it is, the ratio to reach)
    "sngan-32 step": (sngan, 32, "residual SNGAN, 32 x 32, width 64: step", 1.3),
    "pix2pix-256 step": (unet, 16, "U-Net + PatchGAN, 256 x 256, width 16: step", 1.2),
    "vocoder step": (sound, 16, "HiFi-GAN-like, 8,192 samples, width 128: step", 1.2),
}


def arm_of_step(build: Callable[[], tuple[Any, ...]], ours: bool, layout: torch.memory_format) -> Callable[[], object]:
    """One update of both networks, on networks of its own."""
    torch.manual_seed(0)
    networks, inputs, step = build()
    models = [placed(m, layout) for m in networks]
    inputs = tuple(in_layout(x, layout) for x in inputs)
    if ours:
        models = [fastgan.convert(m) for m in models]
    adams = [torch.optim.Adam(m.parameters(), 1e-4, betas=(0.5, 0.9), fused=True) for m in models]
    return lambda: step(*models, *adams, *inputs)


# ---- the tests' networks --------------------------------------------------------------------------------------------


def arm_of_network(name: str, ours: bool, layout: torch.memory_format) -> Callable[[], object]:
    """Forward and backward in training, on a network of its own."""
    torch.manual_seed(0)
    model, arguments = handwritten.FAMILIES[name]()
    inputs = [in_layout(repeated(x), layout) for x in arguments]
    model = placed(model.float(), layout)
    return forward_backward(fastgan.convert(model) if ours else model, inputs)


def forward_backward(model: nn.Module, inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> None:
        model.zero_grad()
        sum(y.square().mean() for y in tree_leaves(model(*inputs))).backward()

    return run


def repeated(x: Tensor) -> Tensor:
    """The argument of a test as float32 at batch BATCH."""
    x = x.float() if x.is_floating_point() else x
    return x.repeat(-(-BATCH // len(x)), *[1] * (x.dim() - 1))[:BATCH]


def placed(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The network with its images' weights in a layout."""
    for p in model.parameters():
        p.data = in_layout(p.data, layout)
    return model


def in_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x


# ---- measuring ------------------------------------------------------------------------------------------------------


def measured(name: str, seconds: float) -> dict[str, Any]:
    """A row: the medians and minima of the four arms, in seconds."""
    if name in STEPS:
        build, batch, what, target = STEPS[name]
        make = lambda ours, layout: arm_of_step(build, ours, layout)
    else:
        batch, what, target = BATCH, f"{name}: forward + backward", 0.98
        make = lambda ours, layout: arm_of_network(name, ours, layout)
    runners = {
        f"{who} {layout}": make(who == "fastgan", memory_format)
        for who in ("torch", "fastgan")
        for layout, memory_format in LAYOUTS.items()
    }
    found = interleave(runners, seconds=seconds, warmup=WARM_UP["step" if name in STEPS else "network"])
    failed = {arm: timing.failed for arm, timing in found.items() if timing.failed}
    if failed:
        raise RuntimeError(f"models: every arm must run, got {failed}")
    times = {kind: {arm: getattr(t, kind) for arm, t in found.items()} for kind in ("median", "min")}
    return {"name": name, "what": what, "batch": batch, "target": target, "seconds": times}


def ratio_of(row: dict[str, Any]) -> float:
    """PyTorch's better layout over fastgan's better layout."""
    best = {who: min(s for arm, s in row["seconds"]["median"].items() if arm.startswith(who)) for who in ("torch", "f")}
    return best["torch"] / best["f"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", help="hold fastgan and PyTorch to one instruction set, as avx2")
    parser.add_argument("--only", nargs="*", default=[*STEPS, *handwritten.FAMILIES], help="rows to measure")
    parser.add_argument("--seconds", type=float, default=0.0, help="of a row's rounds; 0: 20 of a step, 2 of a network")
    args = parser.parse_args()
    if args.table:
        table.hold(args.table)
    STATE.account = unlimited()
    machine = facts.gather("python " + " ".join(sys.argv))
    path = facts.ROOT / "benchmarks" / "results" / f"models-{facts.slug(machine)}.json"
    rows = {row["name"]: row for row in json.loads(path.read_text())["models"]} if path.exists() else {}
    for name in args.only:
        rows[name] = measured(name, args.seconds or (20.0 if name in STEPS else 2.0))
        print(
            name, *(f"{1e3 * s:.3g}" for s in rows[name]["seconds"]["median"].values()), f"{ratio_of(rows[name]):.2f}"
        )
        order = [n for n in (*STEPS, *handwritten.FAMILIES) if n in rows]
        results = {"machine": {**machine, "load_after": facts.load()}, "models": [rows[n] for n in order]}
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
