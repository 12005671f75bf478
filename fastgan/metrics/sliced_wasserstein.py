"""Sliced Wasserstein distance between patches of two sets of images, scale by scale.

Source: Karras et al. 2018 (arXiv:1710.10196), section 5: a Laplacian pyramid, 128 patches of 7 x 7 pixels an image and
scale, each channel of a set of patches brought to mean 0 and deviation 1, 512 random directions, distances times 1000.
It sees textures and their variety at each scale. It does not see how patches are put together into an object, and,
since sets are normalised apart, neither colour nor contrast.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PATCH, PATCHES, DIRECTIONS = 7, 128, 512
AT_ONCE = 32  # directions: with all 512 at once, 1,000 images would take 260 MB of projections
SMALLEST = 14  # side of the coarsest scale: 16 for powers of two, as in the source
BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)


def sliced_wasserstein(a: Tensor, b: Tensor, *, seed: int = 0) -> dict[int, float]:
    """The distance at each scale, times 1000; lower is nearer, and 0 only for equal sets.

    Args:
        a, b: [N, C, H, W] images in [-1, 1] of one shape, on the CPU; N and N' at least 1, sides at least 7.
        seed: of patches and directions; the same seed gives the same number.

    Returns:
        {side of the scale in pixels (its height): distance}, from fine to coarse.

    Raises:
        ValueError: shapes that differ beyond N, or images smaller than a patch.
    """
    if (
        a.dim() != 4
        or b.dim() != 4
        or a.shape[1:] != b.shape[1:]
        or not min(len(a), len(b))
        or min(a.shape[2:]) < PATCH
    ):
        raise ValueError(
            f"sliced_wasserstein: both sets must be [N, C, H, W] of one size of at least {PATCH} x {PATCH}, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for level_a, level_b in zip(pyramid(a), pyramid(b), strict=True):
        sets = [_normalised(_patches(level, rng)) for level in (level_a, level_b)]
        directions = torch.randn(DIRECTIONS, sets[0].shape[1], generator=rng)
        directions /= directions.norm(dim=1, keepdim=True)
        distances = [_distance(*(some @ s.T for s in sets)) for some in directions.split(AT_ONCE)]
        found[level_a.shape[2]] = 1000 * sum(distances) / len(distances)
    return found


def pyramid(x: Tensor) -> list[Tensor]:
    """Laplacian pyramid, from fine to coarse: each scale less what the next coarser one holds; the coarsest itself."""
    levels, x = [], x.float()
    while min(x.shape[2:]) >= 2 * SMALLEST and not (x.shape[2] % 2 or x.shape[3] % 2):
        coarse = _blurred(x)[:, :, ::2, ::2]
        spread = torch.zeros_like(x)
        spread[:, :, ::2, ::2] = 4 * coarse
        levels.append(x - _blurred(spread))
        x = coarse
    return [*levels, x]


def _blurred(x: Tensor) -> Tensor:
    row = torch.tensor(BINOMIAL) / sum(BINOMIAL)
    kernel = torch.outer(row, row).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def _patches(x: Tensor, rng: torch.Generator) -> Tensor:
    """PATCHES random patches of every image, [N PATCHES, C, PATCH, PATCH]."""
    n, c, h, w = x.shape
    top, left = (torch.randint(side - PATCH + 1, (n, PATCHES, 1, 1, 1), generator=rng) for side in (h, w))
    inside = torch.arange(PATCH)
    rows, columns = top + inside[:, None], left + inside
    image, channel = torch.arange(n).view(-1, 1, 1, 1, 1), torch.arange(c).view(-1, 1, 1)
    return x[image, channel, rows, columns].flatten(0, 1)


def _normalised(patches: Tensor) -> Tensor:
    """Mean 0 and deviation 1 of each channel over the set, [M, C PATCH PATCH]; a constant channel becomes 0."""
    deviation, mean = torch.std_mean(patches, dim=(0, 2, 3), keepdim=True, correction=0)
    return ((patches - mean) / deviation.clamp(min=1e-8)).flatten(1)


def _distance(a: Tensor, b: Tensor) -> float:
    """Mean over the rows of the Wasserstein-1 distance between two rows of numbers."""
    # NumPy's sort without indices is several times as fast as torch's, which returns them
    a, b = (torch.from_numpy(np.sort(s.numpy(), axis=1)) for s in (a, b))
    if a.shape[1] != b.shape[1]:  # the quantile functions on the coarser of the two grids
        count = min(a.shape[1], b.shape[1])
        at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        a, b = (s[:, (at * s.shape[1]).long()] for s in (a, b))
    return (a - b).abs().mean().item()
