"""Small sets of every kind that the ranks of a machine read once, and who reads them; see tests/test_sharing.py."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fastgan.data import clips, decode, lines, pairs, sounds

KINDS = ("pairs", "sides", "sounds", "lines", "clips")
LOADERS = {
    "pairs": lambda path: pairs.load_pairs(path, image_size=8, source_channels=1),
    "sides": lambda path: pairs.load_unpaired(path, image_size=8),
    "sounds": lambda path: sounds.load_sounds(str(path), length=64),
    "lines": lambda path: lines.load_lines(str(path), length=8),
    "clips": lambda path: clips.load_clips(str(path), frames=2, image_size=8, channels=1),
}
# what reads one file of a kind: (module, name)
READERS = {
    "pairs": (pairs, "_halves"),
    "sides": (decode, "decode"),
    "sounds": (sounds, "_read"),
    "lines": (lines, "_lines_of"),
    "clips": (clips, "_frames"),
}


def write_sets(root: Path) -> None:
    """A folder of each kind, with a file that cannot be used in each."""
    rng = np.random.default_rng(0)
    for kind, folders in (("pairs", "ab"), ("sides", "ab"), ("clips", ("film", "other"))):
        for folder in folders:
            (root / kind / folder).mkdir(parents=True)
            for k in range(5):
                pixels = rng.integers(0, 256, (10, 10, 3), np.uint8)
                Image.fromarray(pixels).save(root / kind / folder / f"{k}.png")
        (root / kind / "b").mkdir(exist_ok=True)
        (root / kind / "b" / "torn.png").write_bytes(b"\x89PNG")
    (root / "pairs" / "a" / "torn.png").write_bytes(b"\x89PNG")
    (root / "sounds").mkdir()
    for k in range(3):
        with wave.open(str(root / "sounds" / f"{k}.wav"), "wb") as out:
            out.setparams((1, 2, 8000, 0, "NONE", ""))
            out.writeframes(rng.integers(-9000, 9000, 200, np.int16).tobytes())
    (root / "sounds" / "torn.wav").write_bytes(b"RIFF")
    (root / "lines").mkdir()
    for k in range(3):
        (root / "lines" / f"{k}.txt").write_text(f"line {k}\n\nand another\n")


def parts_of(samples) -> tuple:
    return getattr(samples, "parts", (samples,))


def counting(kind: str, patch: Callable) -> list:
    """Patch what reads a file of the kind; a list that grows by an entry a file."""
    module, name = READERS[kind]
    read, seen = getattr(module, name), []

    def once(*arguments, **options):
        seen.append(arguments)
        return read(*arguments, **options)

    patch(module, name, once)
    return seen
