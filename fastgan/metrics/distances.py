"""Distances between features of real and generated images: Frechet, kernel, precision, recall, density, coverage.

Every function takes two [N, F] tensors of features (`fastgan.metrics.features`) and computes in float64, so that the
numbers agree with torch-fidelity's on the same features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE = 2048  # of a matrix of distances or kernel values: 10,000 x 10,000 in float64 would take 800 MB


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated images that look real, and of real images that the generator can make."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density (1: as dense as the real images; may exceed 1) and the share of real images with a generated one near."""

    density: float
    coverage: float


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Squared Frechet (Wasserstein-2) distance between Gaussians fitted to both sets; lower is nearer.

    |m_r - m_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2)), covariances divided by N - 1. With Inception's 2,048 features it
    is the FID. Source: Heusel et al. 2017 (arXiv:1706.08500).

    Args:
        real: [N, F] features of real images, N at least 2.
        fake: [M, F] features of generated images, M at least 2.

    Returns:
        The distance. It is biased upwards by small sets: compare only numbers of equal N and M.

    Raises:
        ValueError: shapes that do not fit, fewer than 2 rows, or features that are not finite.
    """
    real, fake = _checked("frechet_distance", real, fake, least=2)
    (mean_r, cov_r), (mean_f, cov_f) = _gaussian(real), _gaussian(fake)
    # The eigenvalues of C_r C_f are those of the symmetric S C_f S with S = C_r^(1/2): real, and never negative.
    values, vectors = torch.linalg.eigh(cov_r)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cov_f @ root).clamp(min=0).sqrt().sum()
    distance = (mean_r - mean_f).square().sum() + cov_r.trace() + cov_f.trace() - 2 * middle
    return distance.item()


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int | None = None, subset_size: int = 1000, seed: int = 2020
) -> float:
    """Squared maximum mean discrepancy under the kernel (x.y / F + 1)^3, unbiased; lower is nearer; may be negative.

    With Inception's 2,048 features it is the KID. Its expectation does not depend on the number of images, so small
    sets may be compared. Source: Binkowski et al. 2018 (arXiv:1801.01401).

    Args:
        real: [N, F] features of real images, N at least 2.
        fake: [M, F] features of generated images, M at least 2.
        subsets: None takes all pairs of both sets, which has the least variance; a number takes the mean over so many
            random subsets, as published KIDs do (100 of 1,000).
        subset_size: images of a subset, at most N and M.
        seed: of the subsets; the same seed draws the subsets that torch-fidelity 0.4 draws.

    Returns:
        The distance.

    Raises:
        ValueError: shapes that do not fit, fewer than 2 rows, subsets larger than a set, features that are not finite.
    """
    real, fake = _checked("kernel_distance", real, fake, least=2)
    if subsets is None:
        return _squared_mmd(real, fake)
    if subsets < 1 or not 2 <= subset_size <= min(len(real), len(fake)):
        raise ValueError(
            f"kernel_distance: subsets must be at least 1 and subset_size in 2..{min(len(real), len(fake))}, "
            f"got {subsets} and {subset_size}"
        )
    rng = np.random.RandomState(seed)  # torch-fidelity's generator, and its order: generated images first

    def draw(features: Tensor) -> Tensor:
        return features[torch.from_numpy(rng.choice(len(features), subset_size, replace=False)).to(features.device)]

    return sum(_squared_mmd(draw(fake), draw(real)) for _ in range(subsets)) / subsets


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall: the share of points that lie in a k-nearest-neighbour ball of the other set.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991).

    Args:
        real: [N, F] features of real images, N more than k.
        fake: [M, F] features of generated images, M more than k.
        k: neighbours that make a ball's radius.

    Returns:
        (precision, recall).

    Raises:
        ValueError: shapes that do not fit, k below 1, k or fewer rows, or features that are not finite.
    """
    real, fake = _checked("precision_recall", real, fake, least=_neighbours("precision_recall", k) + 1)
    return PrecisionRecall(_within(fake, real, _radii(real, k)), _within(real, fake, _radii(fake, k)))


def density_coverage(real: Tensor, fake: Tensor, *, k: int = 5) -> DensityCoverage:
    """Density and coverage: how many real balls hold a generated point, and how many real balls hold any.

    Unlike recall, coverage uses balls around real points only, so that outliers among generated images do not raise it.
    Source: Naeem et al. 2020 (arXiv:2002.09797).

    Args:
        real: [N, F] features of real images, N more than k.
        fake: [M, F] features of generated images, at least one.
        k: neighbours that make a ball's radius.

    Returns:
        (density, coverage).

    Raises:
        ValueError: shapes that do not fit, k below 1, k or fewer real rows, or features that are not finite.
    """
    real, fake = _checked("density_coverage", real, fake, least=1)
    if len(real) <= _neighbours("density_coverage", k):
        raise ValueError(f"density_coverage: real must have more than k={k} rows, got {len(real)}")
    radii = _radii(real, k)
    inside, covered = 0, 0
    for some, radius in zip(real.split(ROWS_AT_ONCE), radii.split(ROWS_AT_ONCE), strict=True):
        near = _distances(some, fake) < radius[:, None]
        inside += int(near.sum())
        covered += int(near.any(dim=1).sum())
    return DensityCoverage(inside / (k * len(fake)), covered / len(real))


def pairwise_diversity(features: Tensor) -> float:
    """Mean Euclidean distance between different rows of [N, F] features, N at least 2; 0 where all images are one."""
    (features,) = _checked("pairwise_diversity", features, least=2)
    total = sum(_distances(some, features).sum().item() for some in features.split(ROWS_AT_ONCE))
    return total / (len(features) * (len(features) - 1))


def compare(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Every distance of this module, by name, in the order frechet, kernel, precision, recall, density, coverage.

    Precision and recall (k = 3) and density and coverage (k = 5) are left out where a set has k images or fewer.

    Args:
        real: [N, F] features of real images, N at least 2.
        fake: [M, F] features of generated images, M at least 2.

    Raises:
        ValueError: shapes that do not fit, fewer than 2 rows, or features that are not finite.
    """
    found = {"frechet": frechet_distance(real, fake), "kernel": kernel_distance(real, fake)}
    least = min(len(real), len(fake))
    if least > 3:
        found |= precision_recall(real, fake)._asdict()
    if least > 5:
        found |= density_coverage(real, fake)._asdict()
    return found


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _checked(name: str, *sets: Tensor, least: int) -> list[Tensor]:
    shapes = " and ".join(str(tuple(s.shape)) for s in sets)
    if any(s.dim() != 2 or s.shape[1] != sets[0].shape[1] or s.shape[1] == 0 for s in sets):
        raise ValueError(f"{name}: features must be [N, F] of one F, got {shapes}")
    if min(len(s) for s in sets) < least:
        raise ValueError(f"{name}: each set must have at least {least} rows, got {shapes}")
    sets64 = [s.detach().to(torch.float64) for s in sets]
    if not all(bool(s.isfinite().all()) for s in sets64):
        raise ValueError(f"{name}: features must be finite, got NaN or infinity; look at the images they came from")
    return sets64


def _neighbours(name: str, k: int) -> int:
    if k < 1:
        raise ValueError(f"{name}: k must be at least 1, got {k}")
    return k


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(0), torch.atleast_2d(torch.cov(features.T))


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    n, m = len(x), len(y)
    diagonals = [_cube(s.square().sum(1) / s.shape[1] + 1).sum() for s in (x, y)]
    within_x = (_kernel_sum(x, x) - diagonals[0]) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - diagonals[1]) / (m * (m - 1))
    return (within_x + within_y - 2 * _kernel_sum(x, y) / (n * m)).item()


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    total = x.new_zeros(())
    for some in x.split(ROWS_AT_ONCE):
        total += _cube(some @ y.T / x.shape[1] + 1).sum()
    return total


def _cube(k: Tensor) -> Tensor:
    """k^3; pow(3) takes several times as long in float64."""
    return k * k * k


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances, [len(x), len(y)], by a matrix product: in float64 it errs by 1e-8 of the points' norms."""
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")


def _radii(x: Tensor, k: int) -> Tensor:
    """The distance of each point to its k-th neighbour (itself not counted)."""
    return torch.cat([_distances(some, x).kthvalue(k + 1, dim=1).values for some in x.split(ROWS_AT_ONCE)])


def _within(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of points that lie within any ball."""
    inside = sum(int((_distances(some, centres) <= radii).any(dim=1).sum()) for some in points.split(ROWS_AT_ONCE))
    return inside / len(points)
