"""A long run, and the slope of its memory after warm-up: below 1 MB an hour, or this ends with code 1.

    python benchmarks/soak.py [--minutes 120] [--out runs/soak] [--set KEY=VALUE ...]
    python benchmarks/soak.py --read runs/soak        # of a run that is there

Trains `dcgan-28` at a small width on bundled garments with everything on that a run can do at intervals: pictures,
checkpoints, evaluation, looks at its health. The slope is the least squares line through `memory_mb` of log.jsonl over
the training time from a quarter of it on, its error the line's standard error. It also says what lies on the disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from fastgan.training import checkpoint
from fastgan.training.rundir import RunDirectory, read_log

WARM_UP = 0.25  # of the run
MOST = 1.0  # MB an hour
BETWEEN = 50  # steps between two records
SETTINGS = {
    "steps": 100_000_000,
    "batch_size": 16,
    "log_every": BETWEEN,
    "sample_every": 500,
    "checkpoint_every": 250,
    "eval_every": 2000,
    "watch_every": 500,
    "keep_checkpoints": 2,
    "model_options.g_width": 8,
    "model_options.d_width": 8,
}


def train(out: Path, minutes: float, settings: list[str]) -> None:
    """The run; raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "fastgan", "train", "--recipe", "dcgan-28", "--data", "fashion-mnist"]
    command += ["--out", str(out), "--overwrite", "--time-limit", str(60 * minutes), "--precision", "fp32"]
    for setting in [*(f"{key}={value}" for key, value in SETTINGS.items()), *settings]:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def slope(seconds: np.ndarray, megabytes: np.ndarray) -> tuple[float, float]:
    """(MB an hour, its standard error) of the least squares line."""
    hours = seconds / 3600 - seconds.mean() / 3600
    spread = (hours**2).sum()
    found = float((hours * megabytes).sum() / spread)
    left = megabytes - megabytes.mean() - found * hours
    return found, float(np.sqrt((left**2).sum() / max(1, len(left) - 2) / spread))


def report(out: Path) -> int:
    """Print the slope and what the run left; 1 where memory grows."""
    records = [r for r in read_log(out / "log.jsonl") if r["step"] % BETWEEN == 0]
    seconds, megabytes = (np.array([r[key] for r in records]) for key in ("seconds", "memory_mb"))
    after = seconds >= WARM_UP * seconds[-1]
    found, error = slope(seconds[after], megabytes[after])
    hours = seconds[-1] / 3600
    print(
        f"{records[-1]['step']:,} steps in {hours:.2f} hours, {after.sum():,} of {len(records):,} records after warm-up"
    )
    span = f"{megabytes[after].min():.1f} to {megabytes[after].max():.1f} MB"
    print(f"memory {span}, {found:+.2f} +- {error:.2f} MB an hour")
    directory = RunDirectory(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    kept = checkpoint.list_steps(directory.checkpoints)
    others = f"{len(list(directory.samples.iterdir()))} pictures, {directory.log.stat().st_size / 1e6:.1f} MB of log"
    print(f"on disk {size:.1f} MB: {len(kept)} checkpoints, of steps {kept}, {others}")
    return int(found >= MOST)


def main() -> int:
    """Run and read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--read", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.read is None:
        train(args.out, args.minutes, args.settings)
    print(f"{os.cpu_count()} cores")
    return report(args.read or args.out)


if __name__ == "__main__":
    sys.exit(main())
