"""Norms, losses and bias_act as functions, over the number of elements: fastgan against PyTorch's ops, in turns.

    python benchmarks/sizes.py [--threads 1] [--table avx2]        # two minutes; prints a table
    python benchmarks/sizes.py --kernels                           # our kernels at every size, whatever is faster
    python benchmarks/sizes.py --only "loss hinge"                 # rows whose names begin so

"PyTorch" is the norm and torch's activation, or the textbook's formula of a loss. Microseconds are minima, the first
number of a pair PyTorch's; "training" is forward and backward to every input.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator

os.environ.setdefault("FASTGAN_CACHE", tempfile.mkdtemp(prefix="fastgan-sizes-"))

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgan
from fastgan import functional
from fastgan.benchmarking import table
from fastgan.benchmarking.timing import cpu_stopwatch, interleave

Pair = tuple[Callable[..., Tensor], Callable[..., Tensor]]
IMAGES = [(1, 8, 4, 4), (4, 32, 8, 8), (16, 32, 16, 16), (16, 64, 32, 32), (32, 128, 32, 32)]
ROWS = [(4, 32), (64, 128), (256, 512), (1024, 1024), (4096, 1024)]
LOGITS = [(1,), (64,), (1024,), (16_384,), (131_072,), (1_048_576,), (10_000_000,)]


def norms(activation: str | None) -> dict[str, tuple[list[tuple[int, ...]], Pair]]:
    """name -> shapes, (PyTorch's function of x, weight and bias, ours)."""
    act: Callable[[Tensor], Tensor] = (lambda t: F.leaky_relu(t, 0.2)) if activation else (lambda t: t)
    form = {"activation": activation}

    def running(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(x.shape[1]), torch.ones(x.shape[1])

    batch: Pair = (
        lambda x, w, b: act(F.batch_norm(x, None, None, w, b, True)),
        lambda x, w, b: functional.bn_act(x, None, None, w, b, training=True, **form),
    )
    return {
        "batch norm": (IMAGES, batch),
        "batch norm, rows": (ROWS, batch),
        "batch norm, eval": (
            IMAGES,
            (
                lambda x, w, b: act(F.batch_norm(x, *running(x), w, b)),
                lambda x, w, b: functional.bn_act(x, *running(x), w, b, training=False, **form),
            ),
        ),
        "instance norm": (
            IMAGES,
            (
                lambda x, w, b: act(F.instance_norm(x, None, None, w, b)),
                lambda x, w, b: functional.in_act(x, None, None, w, b, **form),
            ),
        ),
        "group norm": (
            IMAGES,
            (
                lambda x, w, b: act(F.group_norm(x, 4, w, b)),
                lambda x, w, b: functional.gn_act(x, 4, w, b, **form),
            ),
        ),
        "layer norm": (
            ROWS,
            (
                lambda x, w, b: act(F.layer_norm(x, w.shape, w, b)),
                lambda x, w, b: functional.ln_act(x, w.shape, w, b, **form),
            ),
        ),
    }


def losses() -> dict[str, Pair]:
    """name -> (PyTorch's function of the fake and the real logits, ours)."""
    sp, relu = F.softplus, torch.relu
    plain: dict[tuple[str, str], Callable[..., Tensor]] = {
        ("bce", "d"): lambda f, r: sp(-r).mean() + sp(f).mean(),
        ("bce", "g"): lambda f, r: sp(-f).mean(),
        ("lsgan", "d"): lambda f, r: 0.5 * (r - 1).square().mean() + 0.5 * f.square().mean(),
        ("lsgan", "g"): lambda f, r: 0.5 * (f - 1).square().mean(),
        ("hinge", "d"): lambda f, r: relu(1 - r).mean() + relu(1 + f).mean(),
        ("hinge", "g"): lambda f, r: -f.mean(),
        ("wasserstein", "d"): lambda f, r: f.mean() - r.mean(),
        ("wasserstein", "g"): lambda f, r: -f.mean(),
        ("relativistic", "d"): lambda f, r: sp(f - r).mean(),
    }

    def ours(kind: str, side: str) -> Callable[..., Tensor]:
        return lambda f, r: functional.gan_loss(f, r if side == "d" else None, kind=kind, side=side)

    return {f"{kind}, {side}": (formula, ours(kind, side)) for (kind, side), formula in plain.items()}


def quickest(run: Callable[[], object], iterations: int) -> float:
    """The stopwatch: `iterations` calls as quick as those of the quickest 0.2 ms, however busy the machine is."""
    batch = max(1, iterations // 50)
    return min(cpu_stopwatch(run, batch) for _ in range(-(-iterations // batch))) / batch * iterations


def row(pair: Pair, tensors: list[Tensor]) -> str:
    """| eval | ratio | training | ratio |"""
    learnt = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        cotangent = torch.randn_like(pair[0](*tensors))

    def evaluated(run: Callable[..., Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return run(*tensors)

        return call

    def trained(run: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(*learnt), learnt, cotangent, allow_unused=True)

    cells = []
    for form in (evaluated, trained):
        found = interleave({"plain": form(pair[0]), "ours": form(pair[1])}, seconds=0.15, stopwatch=quickest)
        plain, own = found["plain"].min, found["ours"].min
        cells.append(f"{1e6 * plain:.1f}, {1e6 * own:.1f} | {plain / own:.2f}")
    return " | ".join(cells)


def cases() -> Iterator[tuple[str, tuple[int, ...], Pair, list[int]]]:
    """(name, shape of x, the pair, sizes of the vectors behind x) of every row."""
    for activation in (None, "leaky_relu"):
        for name, (shapes, pair) in norms(activation).items():
            for shape in shapes:
                size = shape[-1] if name == "layer norm" else shape[1]
                yield name + " + leaky ReLU" * bool(activation), shape, pair, [size, size]
    for name, pair in losses().items():
        for shape in LOGITS:
            yield f"loss {name}", shape, pair, [*shape]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", help="hold fastgan and PyTorch to one instruction set")
    parser.add_argument("--kernels", action="store_true", help="no function goes through PyTorch's ops")
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose names begin so")
    args = parser.parse_args()
    if args.table:
        table.hold(args.table)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    fastgan.racing(not args.kernels)
    print("| function | shape | us, eval | ratio | us, training | ratio |\n|---|---|---:|---:|---:|---:|")
    for name, shape, pair, vectors in cases():
        if name.startswith(args.only):
            tensors = [torch.randn(shape), *(torch.rand(size) + 0.5 for size in vectors)]
            print(f"| {name} | {[*shape]} | {row(pair, tensors)} |", flush=True)


if __name__ == "__main__":
    main()
