"""Fused modules with torch's signatures, defaults and state_dict conventions."""

from fastgan.nn.conv import Conv2dBiasAct, Conv2dBNAct, ConvTranspose2dBiasAct, ConvTranspose2dBNAct
from fastgan.nn.linear import LinearBNAct
from fastgan.nn.norm import (
    BatchNormAct1d,
    BatchNormAct2d,
    GroupNormAct,
    InstanceNormAct2d,
    LayerNormAct,
    stat_groups,
)

__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "Conv2dBNAct",
    "Conv2dBiasAct",
    "ConvTranspose2dBNAct",
    "ConvTranspose2dBiasAct",
    "GroupNormAct",
    "InstanceNormAct2d",
    "LayerNormAct",
    "LinearBNAct",
    "stat_groups",
]
