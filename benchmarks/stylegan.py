"""StyleGAN's ops and a step of stylegan2-small: CPU time of one thread, beside PyTorch's formulas.

    python benchmarks/stylegan.py                # this machine's own instructions, about a minute
    python benchmarks/stylegan.py --table avx2   # both held to AVX2

Minima of rounds in turns. CPU time leaves out the time in which others have the core, so that a busy machine disturbs
it less than wall time; a shared cache and a shared core disturb it still. docs/evidence/cpu-kernels.md has the numbers.
"""

from __future__ import annotations

import argparse
import os
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
    machine = facts.gather("stylegan.py")
    print(f"{machine['cpu']}, {machine['kernels']}, commit {machine['commit']}, load {facts.load()}; ms")
    for shape in FILTERED:
        for name, layout in LAYOUTS.items():
            x, bias = torch.randn(*shape, shape[-1]).contiguous(memory_format=layout), torch.randn(shape[1])
            show(f"filtered_lrelu {shape} {name}", (in_one_pass, composed, plain), (x, bias))
    for form, (f, up, down, padding) in FORMS.items():
        ours = lambda x, f=f, up=up, down=down, p=padding: functional.upfirdn2d(x, f, up, down, p)
        theirs = lambda x, f=f, up=up, down=down, p=padding: resampling.upfirdn2d(x, f, up, down, p)
        for name, layout in LAYOUTS.items():
            x = torch.randn(16, 64, 32, 32).contiguous(memory_format=layout)
            show(f"upfirdn2d {form} {name}", (ours, theirs), (x,))
    steps()


def in_one_pass(x: Tensor, bias: Tensor) -> Tensor:
    return functional.filtered_lrelu(x, resampling.LONG, resampling.LONG, bias, 2, 2, PADDING, clamp=256.0)


def composed(x: Tensor, bias: Tensor) -> Tensor:
    """fastgan's own ops one after another."""
    x = functional.upfirdn2d(functional.bias_act(x, bias, activation=None), resampling.LONG, 2, 1, PADDING, False, 4.0)
    return functional.upfirdn2d(functional.bias_act(x, gain=2**0.5, clamp=256.0), resampling.LONG, 1, 2)


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return resampling.filtered_lrelu(x, resampling.LONG, bias, 2, 2, PADDING)


def show(what: str, functions: Sequence[Callable[..., Tensor]], inputs: tuple[Tensor, ...]) -> None:
    """A line of forward times and of forward + backward times."""
    with torch.no_grad():
        forward = least([lambda f=f: f(*inputs) for f in functions])
    leaves = [t.requires_grad_() for t in inputs]
    dy = torch.randn_like(functions[0](*inputs).detach())
    both = least([lambda f=f: torch.autograd.grad(f(*leaves), leaves, dy) for f in functions])
    figures = "  ".join(" ".join(f"{ms:7.2f}" for ms in times) for times in (forward, both))
    print(f"{what:44} {figures}  ratio {forward[-1] / forward[0]:.1f} {both[-1] / both[0]:.1f}", flush=True)


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


def steps() -> None:
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

    for penalties in (False, True):
        ours, theirs = least([lambda b=b: on(b, penalties) for b in ("auto", "reference")], 6)  # noqa: B023
        what = "with R1 and path lengths" if penalties else "without penalties"
        print(f"stylegan2-small step {what:23} {ours:7.1f} {theirs:7.1f}  ratio {theirs / ours:.2f}", flush=True)


if __name__ == "__main__":
    main()
