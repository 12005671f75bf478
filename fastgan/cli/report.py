"""``fastgan report``: a run's report made anew, or several runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastgan._writing import target_of, write
from fastgan.training import report
from fastgan.training.rundir import RunDirectory

from .arguments import Commands


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "report",
        help="make a run's report, or compare runs",
        description="Make the report of a run from its files, also of one under way; of several runs, one page that "
        "compares their recipes, curves and samples.",
    )
    parser.add_argument("runs", nargs="+", metavar="DIR", help="run directories")
    parser.add_argument("--out", metavar="FILE.html", help="default: DIR/report.html; of several runs comparison.html")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    runs = [RunDirectory(path) for path in args.runs]
    for one in runs:
        one.read_config()
    if len({one.path.resolve() for one in runs}) < len(runs):
        raise ValueError(f"report: each run must be named once, got {' '.join(args.runs)}")
    out = args.out or (str(runs[0].report) if len(runs) == 1 else "comparison.html")
    if Path(out).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"report: --out must end in .html, got {out}")
    target_of(out)
    write(out, report.page(runs[0]) if len(runs) == 1 else report.comparison(runs))
    print(out)
    return 0
