"""The image sets that are part of the package, with where they come from (bundled/NOTICE.md)."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastgan._writing import atomic_file
from fastgan.data.arrays import Array, read_idx
from fastgan.data.decode import pillow, to_pixels

BUNDLED = Path(__file__).parent / "bundled"
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


class Entry(NamedTuple):
    """A bundled set: its description and how to read it."""

    description: str
    read: Callable[[], Array]


def _fashion_mnist() -> Array:
    path = BUNDLED / "fashion-mnist-images-idx3-ubyte.gz"
    labels = read_idx(BUNDLED / "fashion-mnist-labels-idx1-ubyte.gz")
    return Array("fashion-mnist", read_idx(path), labels, FASHION_CLASSES, path=path)


def _emoji() -> Array:
    card = json.loads((BUNDLED / "emoji-64.json").read_text())
    names, tile = card["names"], card["tile"]
    path = BUNDLED / "emoji-64.webp"
    with pillow().open(path, formats=["WEBP"]) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows, columns = pixels.shape[0] // tile, pixels.shape[1] // tile
    tiles = pixels.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)[: len(names)]
    folders = [name.split("/")[0] for name in names]
    classes = sorted(set(folders))
    labels = np.array([classes.index(folder) for folder in folders], np.int64)
    return Array("emoji-64", tiles, labels, classes, path=path)


CATALOGUE = {
    "emoji-64": Entry(
        "1,891 Noto emoji, 64 x 64 RGB on white, 9 classes (Apache-2.0; npm emoji-datasource-google 16.0.0)",
        _emoji,
    ),
    "fashion-mnist": Entry(
        "10,000 grey 28 x 28 pictures of clothing, 10 classes (MIT; the test images of Fashion-MNIST)",
        _fashion_mnist,
    ),
}


def available() -> dict[str, str]:
    """The names that `fastgan.data.load` knows without any file of yours, each with a description."""
    return {name: entry.description for name, entry in CATALOGUE.items()}


def make_emoji_sheet(package: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Make emoji-64.webp and emoji-64.json in folder `out` from an unpacked emoji-datasource-google 16.0.0.

    package: the folder that `npm pack emoji-datasource-google@16.0.0` unpacks to (it holds emoji.json and
    img/google/64). Which pictures are taken, and why: bundled/NOTICE.md. The sheet is lossless; its bytes
    depend on the WebP library, its pixels do not. About 50 s.
    """
    package, out = Path(package), Path(out)
    folder, tile, columns = package / "img" / "google" / "64", 64, 44
    # Skin tone variants count here: a picture that looks the same in all of them keeps none but the first.
    first: dict[bytes, str] = {}
    for path in sorted(folder.iterdir()):
        first.setdefault(path.read_bytes(), path.name)
    kept = set(first.values())
    names = sorted(
        f"{entry['category'].replace(' & ', '_')}/{entry['image']}"
        for entry in json.loads((package / "emoji.json").read_text())
        if entry["category"] != "Component" and entry["image"] in kept
    )
    image = pillow()
    sheet = image.new("RGB", (tile * columns, tile * -(-len(names) // columns)), (255, 255, 255))
    for number, name in enumerate(names):
        with image.open(folder / name.split("/")[1]) as picture:
            pixels = to_pixels(picture, None, 3)[0]
        sheet.paste(image.fromarray(pixels), (number % columns * tile, number // columns * tile))
    encoded = io.BytesIO()
    sheet.save(encoded, "WEBP", lossless=True, quality=100, method=6)
    card = {"origin": "npm emoji-datasource-google 16.0.0, img/google/64", "tile": tile, "names": names}
    for name, content in (
        ("webp", encoded.getvalue()),
        ("json", json.dumps(card, indent=0).encode() + b"\n"),
    ):
        with atomic_file(out / f"emoji-64.{name}") as file:
            file.write(content)
