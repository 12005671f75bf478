"""Batches of images to picture files."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from fastgan._writing import atomic_file
from fastgan.data.decode import pillow

# Between black (Fashion-MNIST) and white (emoji) backgrounds, so that tiles are told apart on both.
GAP = 127


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] (any float dtype, shape and device) as uint8 0..255, rounded to the nearest.

    The inverse of the normalisation of `ImageSet`, bit for bit. Values outside are clamped; NaN becomes 0,
    black. uint8 comes back as it is. TypeError for other integers.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"to_uint8: images must be floats in [-1, 1] or uint8, got {images.dtype}")
    x = images.detach().float().mul(127.5).add(127.5)
    return x.nan_to_num(nan=0.0, posinf=255.0, neginf=0.0).round_().clamp_(0, 255).to(torch.uint8)


def make_grid(images: Tensor, *, columns: int | None = None, padding: int = 2) -> Tensor:
    """A contact sheet uint8 [C, rows (H + padding) + padding, columns (W + padding) + padding] on the CPU.

    images: [N, C, H, W] floats in [-1, 1] or uint8, C 1 or 3, N at least 1. They run along rows. columns
    None: as many as make the sheet about square. Gaps and unused places are mid-grey. ValueError otherwise.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"save_grid: images must be [N, 1 or 3, H, W] with no dimension 0, got {list(images.shape)}")
    if padding < 0 or (columns is not None and columns < 1):
        raise ValueError(f"save_grid: columns must be at least 1 and padding at least 0, got {columns}, {padding}")
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    pixels = to_uint8(images).cpu()
    sheet = torch.full((rows * columns, channels, height + padding, width + padding), GAP, dtype=torch.uint8)
    sheet[:count, :, padding:, padding:] = pixels
    sheet = sheet.view(rows, columns, channels, height + padding, width + padding).permute(2, 0, 3, 1, 4)
    sheet = sheet.reshape(channels, rows * (height + padding), columns * (width + padding))
    # Each tile brings the gap above and to the left of it; the last row and column need one more.
    return torch.nn.functional.pad(sheet, (0, padding, 0, padding), value=GAP)


def save_grid(images: Tensor, path: str | os.PathLike[str], *, columns: int | None = None, padding: int = 2) -> Path:
    """Write `make_grid(images)` to `path` as PNG, or in the format of the path's suffix; returns the path.

    The file appears whole or not at all; missing folders are made. ValueError for shapes that are no batch
    of images and for a suffix that Pillow cannot write.
    """
    path = Path(path)
    sheet = make_grid(images, columns=columns, padding=padding)
    image = pillow()
    suffix = path.suffix.lower()
    if suffix and image.registered_extensions().get(suffix) not in image.SAVE:
        raise ValueError(f"save_grid: the suffix must be one that Pillow writes, such as .png, got {path.name}")
    picture = image.fromarray((sheet[0] if len(sheet) == 1 else sheet.permute(1, 2, 0)).contiguous().numpy())
    with atomic_file(path) as file:
        picture.save(file, format=image.registered_extensions().get(suffix, "PNG"))
    return path
