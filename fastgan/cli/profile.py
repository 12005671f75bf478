"""``fastgan profile``: where a training step's time goes, op by op, beside what the machine could do."""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

import torch

import fastgan
from fastgan._writing import target_of
from fastgan.domains import domain_of
from fastgan.training.assembly import resolve_device
from fastgan.training.precision import NAMES
from fastgan.training.recipes import recipes

from .arguments import Commands, positive_int

SHOWN = 15  # rows of torch's ops; ours are shown all


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "profile",
        help="show where a training step's time goes",
        description="Train a few steps and print time, calls, bytes and FLOPs of every op, beside the roofline.",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help="a name that fastgan train --help lists")
    parser.add_argument("--steps", type=positive_int, default=5, help="profiled steps, and as many timed (default 5)")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace (chrome://tracing, ui.perfetto.dev)")
    parser.add_argument("--data", metavar="NAME|PATH", help="images to train on (default: random ones)")
    parser.add_argument("--batch-size", type=positive_int)
    parser.add_argument("--precision", choices=NAMES)
    parser.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument("--backend", metavar="B", help="force one: reference, native, triton, cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the profile."""
    from fastgan.profiling import profile

    named = recipes()
    if args.recipe not in named:
        raise ValueError(f"profile: there is no recipe {args.recipe!r}, choose one of {', '.join(named)}")
    if args.trace and not target_of(args.trace).parent.is_dir():
        raise ValueError(f"profile: the directory of --trace must exist, got {args.trace}")
    given = {k: v for k in ("data", "batch_size", "precision") if (v := getattr(args, k)) is not None}
    recipe = named[args.recipe].replace(**given).with_settings(args.settings)
    device = resolve_device(args.device)
    images = None
    if args.data:
        images = domain_of(recipe).load(device)
        recipe = domain_of(recipe).fit(images)
    with contextlib.ExitStack() as stack:
        if args.backend:
            stack.enter_context(fastgan.backend(args.backend))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        found = profile(recipe, device=device, steps=args.steps, images=images, trace=args.trace)
    print(json.dumps(found, indent=2)) if args.json else _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    images = f"{found['images_per_second']:,.0f} images/s, {found['step_ms']:.2f} ms a step"
    what = f"{found['recipe']}, batch {found['batch_size']}, {found['precision']}, {found['device']}"
    console.print(f"{what}: {images} (median of {found['steps']}, without the profiler)")
    console.print(found["how"], markup=False)
    limits = found["ceilings"]
    rates = f"{limits['bytes_per_second'] / 1e9:,.1f} GB/s, {limits['flops_per_second'] / 1e9:,.0f} GFLOP/s"
    console.print(f"roofline: {rates} ({limits['how']})")
    console.print(_table(found))
    if "gaps" in found:
        gaps = found["gaps"]
        console.print(f"between kernels: {gaps['ms'] / found['steps']:.3f} ms a step in {gaps['count']} gaps")
        console.print(_kernels(found))
    if found["trace"]:
        console.print(f"trace: {found['trace']}", markup=False)


def _new_table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _table(found: dict[str, Any]) -> Any:
    """Time a step; the last row is what no op accounts for."""
    clock = "device time" if "kernels" in found else "time"
    columns = ("op", "calls", "ms", "%", "MB", "MFLOP", "roofline", "backend")
    table = _new_table(f"{clock}, a step (profiled)", *columns)
    steps, wall = found["steps"], found["wall_ms"]
    shown = 0
    for row in found["rows"]:
        ours = row["kind"] == "fastgan"
        shown += not ours
        if not ours and shown > SHOWN:
            continue
        facts = [row["name"], f"{row['calls'] / steps:g}", f"{row['ms'] / steps:.3f}", f"{100 * row['ms'] / wall:.1f}"]
        if ours and row["bytes"] is not None:
            share = row["share_of_roofline"]
            facts += [f"{row['bytes'] / steps / 1e6:.2f}", f"{row['flops'] / steps / 1e6:.1f}"]
            facts += ["-" if share is None else f"{100 * share:.0f} %"]
        else:
            facts += ["-", "-", "-"]
        table.add_row(*facts, ", ".join(row["backends"]) if ours else "torch")
    other = found["other_ms"]
    table.add_row("outside ops", "", f"{other / steps:.3f}", f"{100 * other / wall:.1f}", "", "", "", "")
    return table


def _kernels(found: dict[str, Any]) -> Any:
    table = _new_table("kernels, a step", "kernel", "calls", "ms")
    for row in found["kernels"][:SHOWN]:
        table.add_row(row["name"][:80], f"{row['calls'] / found['steps']:g}", f"{row['ms'] / found['steps']:.3f}")
    return table
