"""What images from a file cost: decoding once, memory meanwhile, and the trainer's steps beside the step alone.

    python benchmarks/loading.py [--images 20000] [--edge 256] [--loose] [--folder DIR]
    python benchmarks/loading.py --images 1000000 --edge 32 --size 16    # without training

Makes tar shards of JPEGs of 256 x 256 (of 200 different ones; --loose: a folder of files), decodes them to 64 x 64 in
one thread and in all, and trains `dcgan-64` in turns: the step alone on one batch that stays, and `Trainer`'s whole
steps on the mapped file in memory, and on a copy whose pages the system was told to drop. Prints a table. About a
minute and 1 GB of disk.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import mmap
import os
import re
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FASTGAN_CACHE", tempfile.mkdtemp(prefix="fastgan-loading-"))  # races are run anew

import facts
import numpy as np
import torch
from PIL import Image

import fastgan
from fastgan import data
from fastgan.data import decode
from fastgan.data.imageset import Batches
from fastgan.training.signals import Signals

WAYS = {"same": "the step alone", "warm": "the trainer, a file in memory", "cold": "the trainer, a file not in memory"}
SHARD, DIFFERENT, BATCH, WARM_UP, STEPS = 10_000, 200, 64, 6, 20


def make_pictures(folder: Path, count: int, edge: int, loose: bool) -> None:
    """Smooth noise as JPEGs of quality 90, 20 KB each at an edge of 256: in tar files, or loose."""
    rng, contents = np.random.default_rng(0), []
    for _ in range(DIFFERENT):
        file = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8))
        small.resize((edge, edge), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    content = lambda number: contents[number * 7919 % DIFFERENT]
    for number in range(count if loose else 0):
        (folder / f"{number:08d}.jpg").write_bytes(content(number))
    for first in range(0, 0 if loose else count, SHARD):
        with tarfile.open(folder / f"shard-{first // SHARD:06d}.tar", "w") as archive:
            for number in range(first, min(count, first + SHARD)):
                member = tarfile.TarInfo(f"{number:08d}.jpg")
                member.size = len(content(number))
                archive.addfile(member, io.BytesIO(content(number)))


def held() -> float:
    """Memory of this process that no file backs, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1e3


def decoded(shards: Path, cache: Path, threads: int, limit: int, size: int) -> tuple[data.ImageSet, float, float]:
    """(the set, images decoded a second, memory at most beyond what there was before in MB)."""
    workers, decode.workers = decode.workers, lambda: threads
    before, most = held(), [0.0]
    options: Any = dict(image_size=size, channels=3, limit=limit, max_bytes=0, cache_dir=cache)
    start: list[float] = []

    def report(done: int, total: int) -> None:
        start.extend(() if start else (done, time.perf_counter()))  # from the first report on: listing apart
        most[0] = max(most[0], held() - before)

    images = data.load(shards, progress=report, **options)
    pace = (limit - start[0]) / (time.perf_counter() - start[1]) if start else 0.0
    decode.workers = workers
    return images, pace, most[0]


def forget(images: data.ImageSet) -> None:
    """Have the system drop the pages of a mapped file: those of this process first, which would keep them."""
    begin = images.images.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = images.images.data_ptr() + images.nbytes - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
    at = os.open(images.mapped, os.O_RDONLY)
    os.fsync(at)
    os.posix_fadvise(at, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(at)


def fetched() -> float:
    """MB that the disk gave this process so far."""
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1]) / 1e6


def batches(images: data.ImageSet, seed: int) -> Batches:
    return images.batches(BATCH, generator=torch.Generator().manual_seed(seed), flip=True, channels_last=True)


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def begun(images: data.ImageSet, out: Path) -> fastgan.Trainer:
    """A run of `dcgan-64` in the precision that it takes here, before its first step; it draws and saves nothing."""
    never = dict.fromkeys(("sample_every", "watch_every", "eval_every"), 0) | {"checkpoint_every": 10**9}
    recipe = fastgan.recipes()["dcgan-64"].replace(batch_size=BATCH, flip=True, log_every=10**9, steps=10**9, **never)
    run = fastgan.Trainer(recipe, out=out, images=images, quiet=True)
    run._begin()
    run.clock.start(0)
    return run


def chill(run: fastgan.Trainer) -> None:
    """Memory as after a step on a file much larger than it: the next batch alone, which was read ahead."""
    forget(run.images)
    stream = run.batches
    stream._ahead.expect(stream._order[stream.position : stream.position + BATCH])


def compare(path: Path) -> dict[str, tuple[list[float], float, float]]:
    """A key of `WAYS` -> (ms of each step, ms of a batch alone, MB read from disk); the steps take turns."""
    other = path.with_name("cold.npy")
    for suffix in (".npy", ".json"):
        shutil.copy(path.with_suffix(suffix), other.with_suffix(suffix))
    sets = {"warm": data.load(path, max_bytes=0), "cold": data.load(other, max_bytes=0)}
    sets["same"] = sets["warm"]
    runs = {way: begun(images, path.with_name(way)) for way, images in sets.items()}
    sets["warm"].images.sum()
    kept, signals = next(batches(sets["warm"], 0)), Signals()
    work = {way: lambda run=run: run._advance(signals) for way, run in runs.items()}
    work["same"] = lambda: runs["same"].train_step(*kept)
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    disk = dict.fromkeys(WAYS, 0.0)
    for number in range(WARM_UP + STEPS):
        for way in sorted(WAYS, key=lambda way, turn=number: hash((way, turn))):
            if way == "cold":
                chill(runs["cold"])
                time.sleep(0.1)  # a third of a step: the disk has had the whole one before
            before = fetched()
            taken = seconds(work[way])
            if number >= WARM_UP:
                spent[way].append(1e3 * taken)
                disk[way] += fetched() - before
    draws = {way: batches(images, 1).__next__ for way, images in sets.items()} | {"same": lambda: kept}
    alone: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:
        for _ in range(16):
            if way == "cold":
                forget(sets["cold"])
            alone[way].append(1e3 * seconds(draws[way]))
    return {way: (spent[way], statistics.median(alone[way]), disk[way]) for way in WAYS}


def main() -> int:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--edge", type=int, default=256)
    parser.add_argument("--loose", action="store_true")
    parser.add_argument("--size", type=int, default=64, help="to which images are decoded; training needs 64")
    parser.add_argument("--folder")
    args = parser.parse_args()
    found = facts.gather("python " + " ".join(sys.argv))
    print({key: found[key] for key in ("cpu", "cores", "kernels", "torch", "commit", "dirty")})
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        (folder / "shards").mkdir()
        make_pictures(folder / "shards", args.images, args.edge, args.loose)
        listing = seconds(lambda: data.loading.open_source(folder / "shards"))
        print(f"listing {args.images:,} files: {listing:.2f} s")
        for threads, limit in ((1, args.images // 8), (decode.workers(), args.images)):
            images, pace, most = decoded(folder / "shards", folder / "cache", threads, limit, args.size)
            print(f"decoding, {threads} threads: {pace:,.0f} images/s, at most {most:.0f} MB more held")
        path = images.mapped
        del images
        again = seconds(lambda: decoded(folder / "shards", folder / "cache", 2, args.images, args.size))
        print(f"found again, listed and compared: {again:.2f} s; {path.stat().st_size / 1e6:,.0f} MB of pixels")
        rows = compare(path) if args.size == 64 else {}
        for way, (spent, batch, disk) in rows.items():
            median = statistics.median(spent)
            beside = statistics.median(a / b for a, b in zip(spent, rows["same"][0], strict=True)) - 1
            print(
                f"{WAYS[way]}: {median:.1f} ms a step, {BATCH / median * 1e3:.1f} images/s, median of the ratios "
                f"{beside:+.1%}; a batch alone {batch:.2f} ms; {disk:.1f} MB read from disk"
            )
        images = data.load(path, max_bytes=0)
        before, stream = held(), batches(images, 1)
        for _ in range(len(images) // BATCH):
            next(stream)
        print(f"an epoch of batches: {held() - before:+.1f} MB held; load average {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
