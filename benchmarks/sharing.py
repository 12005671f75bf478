"""What samples of other kinds than images cost the ranks of a machine: each reads them, or one for all.

    python benchmarks/sharing.py [--ranks 2] [--scale 1.0]

Makes a set of each kind (4,000 pairs of JPEGs of 128 x 128, 1,500 sounds of 4 s, 400,000 lines, 300 clips), loads it in
so many processes that torchrun has or has not told of each other, and prints the time until all have it and the memory
of all together (proportional set size). Each loads into an empty cache; "found" is a later run's. About two minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

import facts
import numpy as np
from PIL import Image

LOADERS = {
    "pairs": "pairs.load_pairs(path, image_size=64).values",
    "sounds": "sounds.load_sounds(path, length=16384).values",
    "lines": "lines.load_lines(path, length=64).values",
    "clips": "clips.load_clips(path, frames=8, image_size=64, channels=3).values",
}
RANK = """
import sys
from pathlib import Path
import torch
from fastgan.data import clips, lines, pairs, sounds
torch.set_num_threads(1)
def memory():
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("Pss:")) / 1e3
path, before = sys.argv[1], memory()
print("ready", flush=True)
sys.stdin.readline()
values = {load}
total = int(values.sum(dtype=torch.int64))
print("loaded", flush=True)
sys.stdin.readline()
print(memory() - before, values.numel() * values.element_size() / 1e6, total, flush=True)
sys.stdin.readline()
"""


def make(root: Path, scale: float) -> None:
    """A folder a kind; pictures and sounds are smooth noise."""
    rng, count = np.random.default_rng(0), lambda n: max(1, round(n * scale))
    picture = lambda edge: Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((edge, edge))
    for side in "ab":
        (root / "pairs" / side).mkdir(parents=True)
        for k in range(count(4000)):
            picture(128).save(root / "pairs" / side / f"{k:05d}.jpg", quality=90)
    (root / "sounds").mkdir()
    for k in range(count(1500)):
        with wave.open(str(root / "sounds" / f"{k:05d}.wav"), "wb") as out:
            out.setparams((1, 2, 16000, 0, "NONE", ""))
            out.writeframes(np.convolve(rng.normal(0, 3000, 64000), np.ones(4) / 4, "same").astype("<i2").tobytes())
    (root / "lines").mkdir()
    words = np.array([bytes(rng.integers(97, 123, n, np.uint8)).decode() for n in rng.integers(2, 9, 500)])
    rows = (" ".join(row) for row in rng.choice(words, (count(400_000), 8)))
    (root / "lines" / "all.txt").write_text("\n".join(rows))
    for k in range(count(300)):
        first, *rest = (picture(96) for _ in range(16))
        (root / "clips").mkdir(exist_ok=True)
        first.save(root / "clips" / f"{k:04d}.gif", save_all=True, append_images=rest)


def load(kind: str, root: Path, ranks: int, told: bool) -> tuple[float, float, float]:
    """(seconds until all ranks have the set, MB of all of them, MB of one set)."""
    world = {"LOCAL_WORLD_SIZE": str(ranks if told else 1), "FASTGAN_CACHE": str(root / "cache")}
    code = RANK.replace("{load}", LOADERS[kind])
    command = [sys.executable, "-c", code, str(root / kind)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ, **world}}
    jobs = [subprocess.Popen(command, **pipes) for _ in range(ranks)]

    def said() -> list[str]:
        lines = [job.stdout.readline() for job in jobs]
        if not all(lines):
            raise RuntimeError(f"{kind}: a rank has ended, its message stands above")
        return lines

    def go_on() -> None:
        for job in jobs:
            job.stdin.write("\n")
            job.stdin.flush()

    said()
    began = time.perf_counter()
    go_on()
    said()
    seconds = time.perf_counter() - began
    go_on()
    found = [[float(number) for number in line.split()] for line in said()]
    go_on()
    for job in jobs:
        job.wait()
    if len({total for *_, total in found}) != 1:
        raise RuntimeError(f"{kind}: the ranks have other values")
    return seconds, sum(memory for memory, *_ in found), found[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="of the sets (default 1)")
    args = parser.parse_args()
    print(facts.gather(f"python benchmarks/sharing.py --ranks {args.ranks} --scale {args.scale}"), "\n")
    print(f"| {args.ranks} ranks | one set, MB | each reads, s | MB | one reads, s | MB | found, s | MB |")
    print("|---|" + "---|" * 7)
    with tempfile.TemporaryDirectory(prefix="fastgan-sharing-") as folder:
        root = Path(folder)
        make(root, args.scale)
        for kind in LOADERS:
            rows = [load(kind, root, args.ranks, told) for told in (False, True, True)]
            cells = " | ".join(f"{seconds:.2f} | {memory:,.0f}" for seconds, memory, _ in rows)
            print(f"| {kind} | {rows[0][2]:,.0f} | {cells} |", flush=True)
            shutil.rmtree(root / "cache", ignore_errors=True)


if __name__ == "__main__":
    main()
