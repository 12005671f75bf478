"""How far generated images are from real ones, without a pretrained network."""

from fastgan.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = ["sliced_wasserstein"]
