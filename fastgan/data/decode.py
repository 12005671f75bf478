"""One image file to one square uint8 picture: every mode that Pillow reads, rotated, cropped and resized."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Pillow's plugins by name: else a hostile file's content could pick one (EPS would start ghostscript).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "ICO", "AVIF", "JPEG2000")
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "avif", "jp2", "gif", "tif", "tiff"),
        *("bmp", "dib", "ppm", "pgm", "pbm", "pnm", "tga", "ico"),
    )
)
# Larger files are not opened: 90 megapixels, Pillow's own limit, are 360 MB uncompressed.
MAX_FILE_BYTES = 512 << 20

# What is white in 16-bit greys unless told otherwise.
WHITE = 65535

_A = TypeVar("_A")
_R = TypeVar("_R")


class Facts(NamedTuple):
    """What a file was before it became a training picture."""

    mode: str
    width: int
    height: int
    grey: bool
    transparent: bool
    rotated: bool


@dataclass(frozen=True)
class Picture:
    """A decoded file: pixels uint8 [H, W, C] (None if unreadable, with the reason) and its facts."""

    name: str
    pixels: np.ndarray | None = None
    facts: Facts | None = None
    reason: str = ""


class Unreadable(ValueError):
    """A file that holds an image, yet not one with a defined 8-bit meaning."""


def pillow() -> Any:
    """PIL.Image with its plugins registered, or an ImportError that says what to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"data: reading and writing images needs Pillow (pip install pillow): {error}") from error
    Image.init()
    return Image


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Pillow's warnings become silence, its decompression-bomb warning an error.

    Warning filters belong to the process, so this surrounds a whole pool of decoding threads, never one file.
    """
    image = pillow()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", image.DecompressionBombWarning)
        yield


def workers() -> int:
    """Threads for decoding: the cores this process may use, at most 8."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)


def in_order(function: Callable[[_A], _R], items: Iterable[_A]) -> Generator[_R, None, None]:
    """map(function, items) on a thread pool: results in the order of `items`, few of them in flight."""
    threads = workers()
    waiting: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="fastgan-data") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 8 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def significant_bits(file: BinaryIO) -> int | None:
    """The first number of a PNG's sBIT chunk, the bits of a grey that are meant; None without one or in other files."""
    file.seek(0)
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return None
    while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"sBIT":
            return next(iter(file.read(min(length, 4))), None)
        file.seek(length + 4, os.SEEK_CUR)
    return None


def _white_of(file: BinaryIO, white: int | str) -> int:
    """The number that is white in a file of 16-bit greys: `white`, or with "sbit" what the file says."""
    if white != "sbit":
        return int(white)
    bits = significant_bits(file)
    return (1 << bits) - 1 if bits is not None and 1 <= bits <= 16 else WHITE


def _opened(file: BinaryIO) -> Image.Image:
    """The image in a file, of FORMATS alone: not decoded yet. Raises what Pillow raises, and ImportError without it."""
    image = pillow()
    found: Image.Image = image.open(file, formats=[name for name in FORMATS if name in image.OPEN])
    return found


def greatest(file: BinaryIO) -> int:
    """The greatest number in a file of 16-bit greys, 0 in any other."""
    with _opened(file) as image:
        return int(np.asarray(image).max()) if image.mode.startswith("I") else 0


def _deep(image: Image.Image, white: int) -> Image.Image:
    """Single-channel modes deeper than 8 bits in mode F, 0..255: integers 0..white and floats 0..1.

    They are rounded to bytes after they are resized, not before.
    """
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise Unreadable("float pixels outside 0..1 have no defined white")
        return Image.fromarray((values * 255).astype(np.float32))
    if values.min() < 0 or values.max() > WHITE:
        raise Unreadable(f"integer pixels outside 0..{WHITE} have no defined white")
    return Image.fromarray((values.clip(0, white) * (255.0 / white)).astype(np.float32))


def _flat(image: Image.Image, white: int) -> tuple[Image.Image, bool]:
    """The image in mode L, RGB or F (0..255), transparency composited on white, and whether it had any."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _deep(image, white), False
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if transparent:
        # Pillow converts premultiplied grey in two steps only.
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB"), True
    return image.convert("L" if image.mode in ("1", "L") else "RGB"), False


def fit(image: Image.Image, image_size: int | None) -> Image.Image:
    """The centre square of `image`, Lanczos-resized with antialiasing to `image_size`; None leaves it whole.

    The same as resizing the short side and cropping the centre. A square that already fits keeps its pixels.
    """
    from PIL import Image

    if image_size is None:
        return image
    width, height = image.size
    side = min(width, height)
    if width != height:
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image if side == image_size else image.resize((image_size, image_size), Image.Resampling.LANCZOS)


def to_pixels(
    image: Image.Image, image_size: int | None, channels: int | None, white: int = WHITE
) -> tuple[np.ndarray, bool, bool]:
    """uint8 [H, W, C] of a loaded image, whether it is grey and whether it had transparency.

    Grey means that red, green and blue agree in every pixel, whatever the file's mode. With channels None a
    grey image has C = 1 and any other C = 3.
    """
    from PIL import Image

    flat, transparent = _flat(image, white)
    flat = fit(flat, image_size)
    if flat.mode == "F":
        flat = Image.fromarray(np.rint(np.asarray(flat)).clip(0, 255).astype(np.uint8))
    pixels = np.asarray(flat)
    grey = flat.mode == "L" or bool(
        (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    )
    wanted = channels or (1 if grey else 3)
    if wanted == 1:
        return np.asarray(flat.convert("L"))[..., None], grey, transparent
    return np.asarray(flat.convert("RGB")), grey, transparent


def decode(
    file: BinaryIO, image_size: int | None, channels: int | None, white: int | str = WHITE
) -> tuple[np.ndarray, Facts]:
    """The first frame of one encoded image, upright, as uint8 [H, W, C]. Raises what Pillow raises."""
    with _opened(file) as image:
        mode, (width, height) = image.mode, image.size
        if image_size is not None:
            # JPEG can decode at 1/2, 1/4 or 1/8. Down to 4 times the wanted size that changes no pixel by more
            # than 2 of 255 (on noise; at twice the size it is 15), and a 12-megapixel photograph loads 7x faster.
            image.draft(None, (4 * image_size, 4 * image_size))
        image.load()
        rotated = False
        try:
            from PIL import ImageOps

            rotated = image.getexif().get(0x0112, 1) not in (0, 1)
            upright = ImageOps.exif_transpose(image) if rotated else image
        except Exception:
            # Broken EXIF data says nothing about the pixels, which were loaded above.
            upright, rotated = image, False
        deep = upright.mode.startswith("I")
        top = _white_of(file, white) if deep else WHITE
        pixels, grey, transparent = to_pixels(upright, image_size, channels, top)
    return pixels, Facts(mode, width, height, grey, transparent, rotated)


def reason(error: Exception, size: int | None = None) -> str:
    """Why a file could not be read, in words that do not name Python objects."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "empty file" if size == 0 else "not in an image format that is read"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more pixels than the limit against decompression bombs ({Image.MAX_IMAGE_PIXELS:,})"
    if isinstance(error, Unreadable):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = (str(error) or "unreadable").splitlines()[0]
    return text if isinstance(error, (OSError, SyntaxError, ValueError)) else f"{type(error).__name__}: {text}"


def decode_all(
    names: Iterable[str],
    open_file: Callable[[str], AbstractContextManager[tuple[BinaryIO, int]]],
    image_size: int | None,
    channels: int | None,
    white: int | str = WHITE,
) -> Generator[Picture, None, None]:
    """Decode files on a thread pool, in order. `open_file(name)` gives a binary file and its size in bytes.

    Nothing is fatal: a file that cannot be read comes back as a Picture with its reason. To be called and
    gone through inside `quiet_decoding`.
    """

    def one(name: str) -> Picture:
        size = None
        try:
            with open_file(name) as (file, size):
                if size > MAX_FILE_BYTES:
                    raise Unreadable(f"{size / 2**20:,.0f} MiB, more than the {MAX_FILE_BYTES >> 20} MiB that are read")
                pixels, facts = decode(file, image_size, channels, white)
        except Exception as error:
            # Damaged files make Pillow raise nearly anything: struct.error, SyntaxError, IndexError.
            return Picture(name, reason=reason(error, size))
        return Picture(name, pixels, facts)

    return in_order(one, names)
