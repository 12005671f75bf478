"""How far generated images are from real ones: distances between features, and one without a network."""

from fastgan.metrics.backbones import Backbone, cached_features, features, load_backbone
from fastgan.metrics.distances import (
    DensityCoverage,
    PrecisionRecall,
    compare,
    density_coverage,
    frechet_distance,
    kernel_distance,
    pairwise_diversity,
    precision_recall,
)
from fastgan.metrics.ngrams import ngram_divergence
from fastgan.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = [
    "Backbone",
    "DensityCoverage",
    "PrecisionRecall",
    "cached_features",
    "compare",
    "density_coverage",
    "features",
    "frechet_distance",
    "kernel_distance",
    "load_backbone",
    "ngram_divergence",
    "pairwise_diversity",
    "precision_recall",
    "sliced_wasserstein",
]
