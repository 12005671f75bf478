"""``fastgan bench``: how much faster than tuned PyTorch this is, on the machine and device at hand."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastgan._writing import atomic_path, target_of, write
from fastgan.training.assembly import resolve_device
from fastgan.training.recipes import Recipe, recipes
from fastgan.training.step import PRECISIONS

from .arguments import Commands, positive_float, positive_int, seed

RECIPES = {"step": ("dcgan-64",), "penalty": ("r1-dcgan-64", "wgan-gp-64"), "sample": ("dcgan-64",)}
SECONDS = {"op": 1.0, "step": 15.0, "penalty": 8.0, "sample": 5.0}  # some ten rounds of DCGAN-64 on two CPU cores
COLOURS = {False: "#8c8c8c", True: "#0072b2"}  # PyTorch, fastgan

_EPILOG = """shapes of op:
  conv2d:NxCxHxW:OUT,KERNEL[,STRIDE,PADDING,...][:ACTIVATION]        and conv_transpose2d
  bn_act:NxCxHxW[:ACTIVATION]
  gan_loss:N

examples:
  fastgan bench
  fastgan bench step --recipe sngan-32 --precision all --plot step.png
  fastgan bench op --shape conv2d:64x128x32x32:256,4,2,1:leaky_relu --shape bn_act:64x256x8x8:relu
  fastgan bench sample --shape 1x3x64x64 --against eager,compile
  fastgan bench --table avx2"""


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "bench",
        help="time fastgan against tuned PyTorch here",
        description="Time fastgan and PyTorch at the same work, in turns in one process.\n"
        "What does not give the results of eager float32 is not timed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "single ops, a training step (default), a critic's gradient penalty, or generation in eval mode"
    shape = "NxCxHxW of the images; for op as below, repeatable (default: the layers of DCGAN-64)"
    against = "PyTorch's rows, of eager, eager-channels_last, bf16, fp16, compile (default: all of the precision)"
    parser.add_argument("what", nargs="?", choices=tuple(SECONDS), default="step", help=what)
    parser.add_argument("--shape", action="append", default=[], metavar="SHAPE", help=shape)
    parser.add_argument("--recipe", metavar="NAME", help="whose networks and loss (default dcgan-64, or its penalties)")
    parser.add_argument("--batch-size", type=positive_int)
    parser.add_argument("--precision", choices=(*PRECISIONS, "all"), default="fp32", help="of the rows (default fp32)")
    parser.add_argument("--against", metavar="ROW,...", help=against)
    parser.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's)")
    parser.add_argument("--table", metavar="T", help="portable, avx2, avx512, ...: hold fastgan and PyTorch to it")
    parser.add_argument("--seconds", type=positive_float, help="of rounds for each table; at least five rounds run")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and images (default 0)")
    parser.add_argument("--json", metavar="FILE", help="write every sample and what the numbers depend on")
    parser.add_argument("--plot", metavar="FILE", help="draw the medians (needs matplotlib)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if a row of fastgan failed or gave other results."""
    from rich.console import Console

    from fastgan.benchmarking import facts, table, workloads

    if args.table:
        table.hold(args.table)
    for option in ("json", "plot"):
        path = getattr(args, option)
        if path and not target_of(path).parent.is_dir():
            raise ValueError(f"bench: the directory of --{option} must exist, got {path}")
    if args.plot:
        _require_matplotlib()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    rows, works = _rows(args, device), _workloads(args, device)
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    found: dict[str, Any] = {"machine": facts.gather(command, device), "cases": []}
    console = Console(highlight=False)
    console.print(_machine(found["machine"]), markup=False)
    with _process(device):
        for work in works:
            progress = _progress(str(work.case))
            seconds = args.seconds or SECONDS[args.what]
            case = workloads.compare(work, rows, seconds=seconds, device=device, progress=progress)
            found["cases"].append(case)
            _print(console, case)
    found["machine"]["load_after"] = facts.load()
    if args.json:
        write(args.json, json.dumps(found, indent=1) + "\n")
    if args.plot:
        _plot(found, args.plot)
    return int(any(row["failed"] for case in found["cases"] for row in case["rows"] if row["ours"]))


# ---- what is asked for ----------------------------------------------------------------------------------------------


def _rows(args: argparse.Namespace, device: torch.device) -> list[Any]:
    """The rows of --precision that --against names, and fastgan's."""
    from fastgan.benchmarking import workloads

    # few CPUs compute in fp16: only where it is named
    every = list(PRECISIONS) if device.type == "cuda" else ["fp32", "bf16"]
    rows = workloads.rows(every if args.precision == "all" else [args.precision])
    words = {row: "compile" if row.compile else row.name for row in rows if not row.ours}
    asked = list(words.values()) if args.against is None else args.against.split(",")
    for word in asked:
        if word not in words.values():
            known = ", ".join(dict.fromkeys(words.values()))
            raise ValueError(f"bench: --against with --precision {args.precision} takes {known}; got {word!r}")
    return [row for row in rows if row.ours or words[row] in asked]


def _workloads(args: argparse.Namespace, device: torch.device) -> list[Any]:
    from fastgan.benchmarking import workloads

    torch.manual_seed(args.seed)
    if args.what == "op":
        if args.recipe or args.batch_size:
            raise ValueError("bench: op takes neither --recipe nor --batch-size; give --shape its sizes")
        return [workloads.op(spec, device) for spec in args.shape or workloads.OP_SHAPES]
    make = getattr(workloads, args.what)
    return [make(_recipe(name, args), device) for name in ([args.recipe] if args.recipe else RECIPES[args.what])]


def _recipe(name: str, args: argparse.Namespace) -> Recipe:
    """The named recipe at the sizes asked for."""
    if name not in recipes():
        raise ValueError(f"bench: there is no recipe {name!r}, choose one of {', '.join(recipes())}")
    changes = {"seed": args.seed} | ({"batch_size": args.batch_size} if args.batch_size else {})
    if args.shape:
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x\3", " ".join(args.shape))
        if sizes is None or args.batch_size:
            given = " ".join(args.shape) + (" beside --batch-size" if args.batch_size else "")
            raise ValueError(f"bench: --shape must be one NxCxHxW of square images, such as 64x3x64x64, got {given}")
        changes |= dict(zip(("batch_size", "channels", "image_size"), map(int, sizes.groups()), strict=True))
    return recipes()[name].replace(**changes)


@contextlib.contextmanager
def _process(device: torch.device) -> Iterator[None]:
    """Within: that GPU, float32 without TF32, and no warnings of torch.compile about its own code."""
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    with warnings.catch_warnings(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        warnings.filterwarnings("ignore", module=r"torch\.")
        for switch in switches:
            switch.allow_tf32 = False
        try:
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.allow_tf32 = value


# ---- what is shown --------------------------------------------------------------------------------------------------


def _progress(case: str) -> Any:
    """A function that says what is being done: a line on stderr, the first after two seconds, then every two."""
    last = time.monotonic()

    def show(doing: str) -> None:
        nonlocal last
        if time.monotonic() - last > 2:
            print(f"{case}: {doing}", file=sys.stderr, flush=True)
            last = time.monotonic()

    return show


def _machine(facts: dict[str, Any]) -> str:
    gpu = f"{facts['gpu']}, CUDA {facts['cuda']}, TF32 off; " if "gpu" in facts else ""
    place = f"{facts['cpu']}, {facts['threads']} threads of {facts['cores']} cores, kernels {facts['kernels']}"
    return f"{gpu}{place}\ntorch {facts['torch']}, fastgan {facts['fastgan']}, load average {facts['load_before']}"


def _print(console: Any, case: dict[str, Any]) -> None:
    """The table of a case, then a line for each row of fastgan's and each that failed: a loss reads as a win does."""
    from rich.table import Table
    from rich.text import Text

    from fastgan.benchmarking.comparison import digits, milliseconds, versus

    title = f"{case['op']} {case['shape']}, {case['direction']}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for column in ("row", "median ms", "quartiles", "peak MB", "vs PyTorch"):
        table.add_column(column, justify="left" if column == "row" else "right")
    said = []
    for row in case["rows"]:
        name, won = row["row"], (row["speedup"] or 0) >= 1
        if row["failed"]:
            table.add_row(name, "failed")
            said.append(Text(f"{name} is not ranked: {row['failed']}", style="red"))
            continue
        quartiles = f"{milliseconds(row['q1_s'])} to {milliseconds(row['q3_s'])}"
        table.add_row(name, milliseconds(row["median_s"]), quartiles, digits(row["peak_bytes"] / 1e6), versus(row))
        if row["ours"] and row["speedup"]:
            rival = f"{row['best_pytorch']}, PyTorch's best in {row['dtype']}"
            ratio = f"{row['speedup']:.2f} times the speed of {rival}{'' if won else ', slower'}"
            ran = f"; ran on {row['backends']}" if row["backends"] else ""  # a replayed graph hides its ops
            said.append(Text(f"{name}: {ratio}{ran}", style="green" if won else "red"))
    console.print(table, *said, sep="\n")
    console.print()


def _require_matplotlib() -> None:
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            "bench: --plot needs the package matplotlib, which is not installed; pip install matplotlib, or use --json"
        ) from error


def _plot(found: dict[str, Any], path: str) -> None:
    """A panel a case: medians as bars, quartiles as whiskers; a row that failed keeps its place."""
    importlib.import_module("matplotlib").use("Agg")
    plot = importlib.import_module("matplotlib.pyplot")
    cases = found["cases"]
    heights = [len(case["rows"]) + 2 for case in cases]
    size = (8, 0.3 * sum(heights) + 0.6)
    figure, axes = plot.subplots(len(cases), figsize=size, squeeze=False, height_ratios=heights, layout="constrained")
    for axis, case in zip(axes[:, 0], cases, strict=True):
        for at, row in enumerate(case["rows"]):
            if row["failed"]:
                axis.text(0, at, " failed", va="center")
                continue
            low, middle, high = (1e3 * row[key] for key in ("q1_s", "median_s", "q3_s"))
            axis.barh(at, middle, xerr=[[middle - low], [high - middle]], color=COLOURS[row["ours"]])
        axis.set_yticks(range(len(case["rows"])), [row["row"] for row in case["rows"]])
        axis.set_title(f"{case['op']} {case['shape']}, {case['direction']}: ms (less is better)", fontsize=9)
        axis.set_xlim(left=0)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_machine(found["machine"]), fontsize=7)
    with atomic_path(path) as part:
        figure.savefig(part, dpi=110)
    plot.close(figure)
