"""Real images beside generated ones: a sheet of the training set, and the images nearest to samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgan import data
from fastgan.metrics import features, load_backbone

from .rundir import RunDirectory
from .sampling import evenly

__all__ = ["compare_with_images", "nearest_images"]

SHOWN = 12  # samples
SEARCHED = 2000  # training images: 2 s of one core at 32 x 32
AT_ONCE = 1024  # samples whose distances are held at a time


class _Found(NamedTuple):
    """Of samples: the searched images uint8 [M, C, H, W], their features, and which is how far from each sample."""

    known: Tensor
    features: Tensor
    distances: Tensor
    at: Tensor


def _search(images: Tensor, made: Tensor) -> _Found:
    known = images[evenly(len(images), SEARCHED).to(images.device)].cpu()
    backbone = load_backbone()
    real, fake = features(known, backbone), features(made, backbone)
    least = [torch.cdist(some, real).min(1) for some in fake.split(AT_ONCE)]
    return _Found(known, real, torch.cat([m.values for m in least]), torch.cat([m.indices for m in least]))


def nearest_images(images: Tensor, made: Tensor) -> Tensor:
    """For each of the samples `made` [N, C, H, W] in [-1, 1] the image with the nearest features, likewise, on the CPU.

    images: uint8 [M, C, H, W], of which 2,000 are searched, evenly over them. Features are those of the backbone
    "small". ValueError where a sample is not finite.
    """
    if not made.isfinite().all():
        raise ValueError("nearest: samples must be finite, some are not")
    found = _search(images, made)
    return found.known[found.at].float() / 127.5 - 1


def compare_with_images(directory: RunDirectory, images: Tensor, made: Tensor, columns: int | None) -> str:
    """Write pictures/real.png and pictures/nearest.png; a sentence on whether samples repeat training images.

    images: uint8 [N, C, H, W]. made: samples in [-1, 1]. The sentence compares the median distance of a sample from its
    nearest training image with the distance between a training image and its nearest other one. The ratio is near 0
    for a generator that has learnt its images by heart.
    """
    folder = directory.pictures
    sheet = images[evenly(len(images), len(made)).to(images.device)].cpu()
    data.save_grid(sheet, folder / "real.png", columns=columns)
    if len(images) < 2 or not made.isfinite().all():
        return ""
    known, real, distance, nearest = _search(images, made)
    among = torch.cdist(real, real).fill_diagonal_(float("inf")).min(1).values
    shown = evenly(len(made), SHOWN)
    pairs = torch.cat([data.to_uint8(made[shown]), known[nearest[shown]]])
    data.save_grid(pairs, folder / "nearest.png", columns=len(shown))
    share = float(distance.median() / among.median().clamp(min=1e-12))
    said = (
        f"a sample is {share:.2f} times as far from its nearest training image as training images are from theirs; "
        "of copies it would be 0 times"
    )
    searched = "all" if len(known) == len(images) else f"{len(known):,} of the"
    return f"{said} (medians, features of {load_backbone().identity}, {searched} {len(images):,} images)"
