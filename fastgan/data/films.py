"""Films as .mp4, by the package imageio-ffmpeg."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from torch.nn.functional import pad

from fastgan._writing import atomic_path

__all__ = ["require_ffmpeg", "save_mp4"]


def require_ffmpeg(command: str) -> None:
    """ImportError, which begins with `command`, where the package is missing."""
    try:
        importlib.import_module("imageio_ffmpeg")
    except ImportError as error:
        raise ImportError(
            f"{command}: mp4 needs the package imageio-ffmpeg, which is not installed; "
            "pip install imageio-ffmpeg, or write a .gif"
        ) from error


def save_mp4(pictures: Iterable[Tensor], path: str | Path, *, fps: float) -> None:
    """Pictures [height, width, 3] uint8 of one size, one after the other, as H.264; odd sides get a black line more."""
    ffmpeg = importlib.import_module("imageio_ffmpeg")
    with atomic_path(path) as part, contextlib.ExitStack() as stack:
        writer = None
        for picture in pictures:
            height, width, _ = picture.shape
            # H.264 with 4:2:0 colour wants even sizes
            picture = pad(picture, (0, 0, 0, width % 2, 0, height % 2))
            if writer is None:
                size = (picture.shape[1], picture.shape[0])
                writer = ffmpeg.write_frames(str(part), size, fps=fps, macro_block_size=1)
                stack.callback(writer.close)
                writer.send(None)
            writer.send(picture.contiguous().numpy())
