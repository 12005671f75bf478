"""Networks in plain ``torch.nn``: read them, copy them, or bring your own. `fastgan.convert` makes any of
them fast.

    generator, discriminator = fastgan.models.build("dcgan-64", image_size=32, g_width=32)

Every generator maps z ``[N, latent]`` to images in [-1, 1] and has the attributes `latent`, `image_size`,
`channels`; every discriminator maps images to logits ``[N]``. ``per_sample = True`` says that a model's
forward mixes no samples other than through batch norm, which lets a training step run real and generated
images as one batch. With the option `classes` both take labels ``[N]`` as a second argument (`conditional`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attention import DotProductAttention
from .chargan import CharDiscriminator, CharGenerator, build_chargan
from .clip import ClipDiscriminator, ClipGenerator, build_clip
from .conditional import ClassAffine, LabelledDiscriminator, LabelledGenerator, ProjectionDiscriminator
from .cyclegan import BothCritics, BothWays, ResidualGenerator, build_cyclegan
from .dcgan import (
    ConditionalDCGANGenerator,
    DCGANDiscriminator,
    DCGANGenerator,
    KerasDCGANDiscriminator,
    KerasDCGANGenerator,
    MinibatchDeviation,
    build_by_size,
    build_dcgan,
    build_keras_dcgan,
)
from .hifigan import MelGenerator, SoundDiscriminators, build_hifigan
from .mlp import MLPDiscriminator, MLPGenerator
from .mlp import build as build_mlp
from .pix2pix import PatchGAN, UNet, build_pix2pix
from .r3gan import R3GANDiscriminator, R3GANGenerator, build_r3gan, build_r3gan_filtered
from .resnet import ConditionalSNGANGenerator, SNGANDiscriminator, SNGANGenerator, build_sngan
from .sagan import SelfAttention2d, build_sagan
from .stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator, build_stylegan2
from .vit import TransformerBlock, ViTDiscriminator, build_vit
from .wavegan import WaveDiscriminator, WaveGenerator, build_wavegan

__all__ = [
    "BothCritics",
    "BothWays",
    "CharDiscriminator",
    "CharGenerator",
    "ClassAffine",
    "ClipDiscriminator",
    "ClipGenerator",
    "ConditionalDCGANGenerator",
    "ConditionalSNGANGenerator",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DotProductAttention",
    "KerasDCGANDiscriminator",
    "KerasDCGANGenerator",
    "LabelledDiscriminator",
    "LabelledGenerator",
    "MLPDiscriminator",
    "MLPGenerator",
    "MelGenerator",
    "MinibatchDeviation",
    "PatchGAN",
    "Preset",
    "ProjectionDiscriminator",
    "R3GANDiscriminator",
    "R3GANGenerator",
    "ResidualGenerator",
    "SNGANDiscriminator",
    "SNGANGenerator",
    "SelfAttention2d",
    "SoundDiscriminators",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "TransformerBlock",
    "UNet",
    "ViTDiscriminator",
    "WaveDiscriminator",
    "WaveGenerator",
    "build",
    "options",
    "presets",
    "register",
]


@dataclass(frozen=True)
class Preset:
    """A named pair of networks: the function that builds it and the text it follows."""

    name: str
    build: Callable[..., tuple[nn.Module, nn.Module]]
    source: str


_PRESETS = {
    p.name: p
    for p in (
        Preset(
            "mlp-28",
            build_mlp,
            "fully connected GAN of the PyTorch-GAN collection, after Goodfellow et al. 2014",
        ),
        Preset(
            "dcgan-28",
            build_keras_dcgan,
            "TensorFlow's Keras tutorial, tensorflow.org/tutorials/generative/dcgan",
        ),
        Preset("dcgan-64", build_dcgan, "pytorch/examples dcgan, after Radford et al. 2016 (arXiv:1511.06434)"),
        Preset("fastgan", build_by_size, "the networks of dcgan-64, their width by image size, no norm in D"),
        Preset("sngan-32", build_sngan, "Miyato et al. 2018 (arXiv:1802.05957), table 4"),
        Preset("pix2pix", build_pix2pix, "Isola et al. 2017 (arXiv:1611.07004), U-Net and PatchGAN by image size"),
        Preset("cyclegan", build_cyclegan, "Zhu et al. 2017 (arXiv:1703.10593), two residual generators and PatchGANs"),
        Preset(
            "r3gan",
            build_r3gan_filtered,
            "Huang et al. 2024 (arXiv:2501.05441), its blocks and filters at a sixth of its width",
        ),
        Preset("r3gan-small", build_r3gan, "Huang et al. 2024 (arXiv:2501.05441), at a fraction of its size"),
        Preset("stylegan2-small", build_stylegan2, "Karras et al. 2020 (arXiv:1912.04958), with at most 64 channels"),
        Preset("chargan", build_chargan, "Gulrajani et al. 2017 (arXiv:1704.00028), its language model in small"),
        Preset("wavegan", build_wavegan, "Donahue et al. 2019 (arXiv:1802.04208), at a quarter of width and length"),
        Preset(
            "hifigan-small", build_hifigan, "Kong et al. 2020 (arXiv:2010.05646), at an eighth of V1's width or less"
        ),
        Preset("sagan-32", build_sagan, "Zhang et al. 2019 (arXiv:1805.08318), on the networks of sngan-32"),
        Preset(
            "vit-gan-small",
            build_vit,
            "D: Dosovitskiy et al. 2021 (arXiv:2010.11929), small, patches as ViTGAN (arXiv:2107.04589); G: dcgan-64's",
        ),
        Preset("clip-32", build_clip, "TGAN's generator (arXiv:1611.06624), a discriminator with temporal shift"),
    )
}


def presets() -> dict[str, Preset]:
    """Every preset by name."""
    return dict(_PRESETS)


def register(preset: Preset) -> Preset:
    """Make a model of your own known by its name, so that recipes can train it; returns it."""
    _PRESETS[preset.name] = preset
    return preset


def _preset(name: str) -> Preset:
    if name not in _PRESETS:
        raise ValueError(f"models: there is no model {name!r}, choose one of {', '.join(sorted(_PRESETS))}")
    return _PRESETS[name]


def options(name: str) -> dict[str, Any]:
    """The keyword options of preset `name` with their defaults."""
    parameters = inspect.signature(_preset(name).build).parameters
    return {key: parameter.default for key, parameter in parameters.items()}


def build(name: str, **overrides: Any) -> tuple[nn.Module, nn.Module]:
    """``(generator, discriminator)`` of preset `name`, freshly initialised from torch's global generator.

    `overrides` replace the preset's options (see `options`). Raises ValueError for an unknown preset, option
    or value.
    """
    preset = _preset(name)
    known = options(name)
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"models: {name} has no option {unknown[0]!r}, it takes {', '.join(known)}")
    return preset.build(**overrides)
