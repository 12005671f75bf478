"""What images from a file cost: decoding once, memory meanwhile, and batches beside the training step alone.

    python benchmarks/loading.py [--images 20000] [--folder DIR]

Makes tar shards of JPEGs of 256 x 256 (of 200 different ones), decodes them to 64 x 64 in one thread and in all, and
trains `dcgan-64` in turns on one batch that stays, on batches of the mapped file in memory, and of a copy whose pages
the system was told to drop. Prints a table. About a minute and 1 GB of disk.
"""

from __future__ import annotations

import argparse
import io
import os
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

WAYS = {"same": "one batch that stays", "warm": "a file in memory", "cold": "a file that is not in memory"}
SHARD, DIFFERENT, BATCH, WARM_UP, STEPS = 10_000, 200, 64, 6, 20


def make_shards(folder: Path, count: int) -> None:
    """Smooth noise as JPEGs of quality 90, 20 KB each."""
    rng, contents = np.random.default_rng(0), []
    for _ in range(DIFFERENT):
        file = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"shard-{first // SHARD:06d}.tar", "w") as archive:
            for number in range(first, min(count, first + SHARD)):
                content = contents[number * 7919 % DIFFERENT]
                member = tarfile.TarInfo(f"{number:08d}.jpg")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def held() -> float:
    """Memory of this process that no file backs, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1e3


def decoded(shards: Path, cache: Path, threads: int, limit: int) -> tuple[data.ImageSet, float, float]:
    """(the set, images decoded a second, memory at most beyond what there was before in MB)."""
    workers, decode.workers = decode.workers, lambda: threads
    before, most = held(), [0.0]
    options: Any = dict(image_size=64, channels=3, limit=limit, max_bytes=0, cache_dir=cache)
    start: list[float] = []

    def report(done: int, total: int) -> None:
        start.extend(() if start else (done, time.perf_counter()))  # from the first report on: listing apart
        most[0] = max(most[0], held() - before)

    images = data.load(shards, progress=report, **options)
    pace = (limit - start[0]) / (time.perf_counter() - start[1]) if start else 0.0
    decode.workers = workers
    return images, pace, most[0]


def forget(path: Path) -> None:
    """Have the system drop a file's pages; those that a process has mapped stay."""
    at = os.open(path, os.O_RDONLY)
    os.fsync(at)
    os.posix_fadvise(at, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(at)


def batches(images: data.ImageSet, seed: int) -> Batches:
    return images.batches(BATCH, generator=torch.Generator().manual_seed(seed), flip=True, channels_last=True)


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compare(path: Path, step: fastgan.GANStep) -> dict[str, tuple[float, float]]:
    """A key of `WAYS` -> (ms a step with its batch, ms of a batch alone): medians of steps that take turns."""
    other = path.with_name("cold.npy")
    for suffix in (".npy", ".json"):
        shutil.copy(path.with_suffix(suffix), other.with_suffix(suffix))
    warm, cold = (data.load(where, max_bytes=0) for where in (path, other))
    warm.images.sum()
    forget(other)  # what was read to compare checksums; nothing of it is mapped yet
    kept = next(batches(warm, 0))
    draws = {"same": lambda: kept, "warm": batches(warm, 1).__next__, "cold": batches(cold, 1).__next__}
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(WARM_UP + STEPS):
        for way in sorted(WAYS, key=lambda way, turn=number: hash((way, turn))):
            taken = seconds(lambda way=way: step(draws[way]()[0]))
            if number >= WARM_UP:
                spent[way].append(1e3 * taken)
    alone = {way: statistics.median(1e3 * seconds(draw) for _ in range(32)) for way, draw in draws.items()}
    return {way: (statistics.median(spent[way]), alone[way]) for way in WAYS}


def make_step() -> fastgan.GANStep:
    """dcgan-64 in the precision that a run takes here."""
    torch.manual_seed(0)
    g, d = (m.to(memory_format=torch.channels_last) for m in fastgan.models.build("dcgan-64"))
    adam = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999), fused=True) for m in (g, d)]
    return fastgan.GANStep(g, d, latent=100, g_optimizer=adam[0], d_optimizer=adam[1], precision="auto")


def main() -> int:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--folder")
    args = parser.parse_args()
    found = facts.gather("python " + " ".join(sys.argv))
    print({key: found[key] for key in ("cpu", "cores", "kernels", "torch", "commit", "dirty")})
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        (folder / "shards").mkdir()
        make_shards(folder / "shards", args.images)
        listing = seconds(lambda: data.loading.open_source(folder / "shards"))
        print(f"listing {args.images:,} members: {listing:.2f} s")
        for threads, limit in ((1, args.images // 8), (decode.workers(), args.images)):
            images, pace, most = decoded(folder / "shards", folder / "cache", threads, limit)
            print(f"decoding, {threads} threads: {pace:,.0f} images/s, at most {most:.0f} MB more held")
        path = images.mapped
        del images
        again = seconds(lambda: decoded(folder / "shards", folder / "cache", 2, args.images))
        print(f"found again, listed and compared: {again:.2f} s; {path.stat().st_size / 1e6:,.0f} MB of pixels")
        rows = compare(path, make_step())
        for name, (whole, batch) in rows.items():
            more = f"{BATCH / whole * 1e3:.1f} images/s, {whole / rows['same'][0] - 1:+.1%}"
            print(f"{WAYS[name]}: {whole:.1f} ms a step, {more}; a batch alone {batch:.2f} ms")
        images = data.load(path, max_bytes=0)
        before, stream = held(), batches(images, 1)
        for _ in range(len(images) // BATCH):
            next(stream)
        print(f"an epoch of batches: {held() - before:+.1f} MB held; load average {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
