"""StyleGAN's ops and a step of stylegan2-small: CPU time of one thread, beside PyTorch's formulas.

    python benchmarks/stylegan.py                # this machine's own instructions, about a minute
    python benchmarks/stylegan.py --table avx2   # both held to AVX2

Results go into benchmarks/results, and `make evidence` makes the page of them. Minima of rounds in turns. CPU time
leaves out the time in which others have the core, so that a busy machine disturbs it less than wall time; a shared
cache and a shared core disturb it still.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("FASTGAN_CACHE", tempfile.mkdtemp(prefix="fastgan-stylegan-"))

import facts
import resampling
import torch
import torch.nn.functional as F
from bench_upfirdn2d import FORMS
from torch import Tensor

import fastgan
from fastgan import functional, models
from fastgan.benchmarking import table

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
FILTERED = [(8, 64, 36), (8, 32, 68), (1, 3, 68)]  # samples, channels, pixels along a side
PADDING = (11, 10, 11, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", help="hold fastgan and PyTorch to one instruction set, as avx2")
    args = parser.parse_args()
    if args.table:
        table.hold(args.table)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fastgan.racing(False)
    machine = facts.gather("python " + " ".join(sys.argv))
    rows: list[dict[str, Any]] = []
    for shape in FILTERED:
        for name, layout in LAYOUTS.items():
            x, bias = torch.randn(*shape, shape[-1]).contiguous(memory_format=layout), torch.randn(shape[1])
            what = f"filtered_lrelu {'x'.join(map(str, (*shape, shape[-1])))} {name}"
            rows += both(what, (in_one_pass, plain, composed), (x, bias))
    for form, (f, up, down, padding) in FORMS.items():
        ours = lambda x, f=f, up=up, down=down, p=padding: functional.upfirdn2d(x, f, up, down, p)
        theirs = lambda x, f=f, up=up, down=down, p=padding: resampling.upfirdn2d(x, f, up, down, p)
        for name, layout in LAYOUTS.items():
            x = torch.randn(16, 64, 32, 32).contiguous(memory_format=layout)
            rows += both(f"upfirdn2d {form} 16x64x32x32 {name}", (ours, theirs), (x,))
    rows += steps()
    machine["load_after"] = facts.load()
    path = facts.ROOT / "benchmarks" / "results" / f"stylegan-{facts.slug(machine)}.json"
    path.write_text(json.dumps({"machine": machine, "stylegan": rows}, indent=1) + "\n")
    print(f"written: {path}")


def in_one_pass(x: Tensor, bias: Tensor) -> Tensor:
    return functional.filtered_lrelu(x, resampling.LONG, resampling.LONG, bias, 2, 2, PADDING, clamp=256.0)


def composed(x: Tensor, bias: Tensor) -> Tensor:
    """fastgan's own ops one after another."""
    x = functional.upfirdn2d(functional.bias_act(x, bias, activation=None), resampling.LONG, 2, 1, PADDING, False, 4.0)
    return functional.upfirdn2d(functional.bias_act(x, gain=2**0.5, clamp=256.0), resampling.LONG, 1, 2)


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return resampling.filtered_lrelu(x, resampling.LONG, bias, 2, 2, PADDING)


def row(what: str, times: Sequence[float]) -> dict[str, Any]:
    """times: fastgan's, PyTorch's, and where there is one the composition's."""
    print(f"{what:60}" + " ".join(f"{ms:8.2f}" for ms in times), flush=True)
    return {"what": what, "ms": dict(zip(("fastgan", "torch", "composition"), times, strict=False))}


def both(what: str, functions: Sequence[Callable[..., Tensor]], inputs: tuple[Tensor, ...]) -> list[dict[str, Any]]:
    """The rows of forward and of forward + backward."""
    with torch.no_grad():
        forward = least([lambda f=f: f(*inputs) for f in functions])
    leaves = [t.requires_grad_() for t in inputs]
    dy = torch.randn_like(functions[0](*inputs).detach())
    back = least([lambda f=f: torch.autograd.grad(f(*leaves), leaves, dy) for f in functions])
    return [row(f"{what} forward", forward), row(f"{what} forward + backward", back)]


def least(runs: Sequence[Callable[[], Any]], rounds: int = 8) -> list[float]:
    """Least milliseconds of each, in turns; the first round warms up."""
    found = [float("inf")] * len(runs)
    for turn in range(rounds):
        for i, run in enumerate(runs):
            begin = time.process_time()
            run()
            if turn:
                found[i] = min(found[i], 1e3 * (time.process_time() - begin))
    return found


def steps() -> list[dict[str, Any]]:
    """A step of stylegan2-small at 32 pixels and batch 16, its ops ours and PyTorch's formulas for them."""
    g, d = models.build("stylegan2-small", image_size=32, channels=3, latent=64)
    optimizers = [torch.optim.Adam(net.parameters(), 2e-3, (0.0, 0.99)) for net in (g, d)]
    real = torch.randn(16, 3, 32, 32)

    def step(penalties: bool) -> None:
        with torch.no_grad():
            fake = g(torch.randn(16, 64))
        optimizers[1].zero_grad()
        (F.softplus(d(fake)).mean() + F.softplus(-d(real)).mean()).backward()
        if penalties:
            x = real.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
            (0.8 * gradient.square().sum() / len(x)).backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        F.softplus(-d(g(torch.randn(16, 64)))).mean().backward()
        if penalties:
            (8.0 * g.path_length_penalty(torch.randn(8, 64))).backward()
        optimizers[0].step()

    def on(backend: str, penalties: bool) -> None:
        with fastgan.backend(backend):
            step(penalties)

    return [
        row(
            "stylegan2-small step, batch 16, " + ("R1 and path lengths" if penalties else "no penalties"),
            least([lambda b=b, p=penalties: on(b, p) for b in ("auto", "reference")], 6),
        )
        for penalties in (False, True)
    ]


if __name__ == "__main__":
    main()
