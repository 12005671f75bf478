"""Pictures: bytes from files, in [-1, 1] to the networks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgan import data
from fastgan.training.evaluation import NAMES, FeatureJudge
from fastgan.training.health import Health
from fastgan.training.nearest import compare_with_images
from fastgan.training.outputs import Outputs
from fastgan.training.recipes import Recipe
from fastgan.training.rundir import RunDirectory

from .domain import Domain

__all__ = ["Images"]


class Images(Domain):
    """Square pictures of one or three channels, with classes or without."""

    name = "images"
    noun = "images"
    metrics = tuple(NAMES)
    charts: ClassVar = {"Kernel distance": {"kcd": "kcd, features of small; lower is nearer"}}
    # stream: whether images stay in a file that is mapped although memory would hold them.
    options: ClassVar = {"stream": False}

    def load(self, device: torch.device) -> data.ImageSet:
        """What `fastgan.data.load` reads."""
        recipe = self.recipe
        wanted: Any = dict(image_size=recipe.image_size, channels=recipe.channels, labels=recipe.labels)
        most = 0 if self.option["stream"] else None
        return data.load(recipe.data, **wanted, device=device, max_bytes=most, progress=self.progress)

    def fit(self, samples: data.ImageSet) -> Recipe:
        """A conditional recipe with as many classes as the images have; any other as it is."""
        shape = tuple(samples.images.shape[1:])
        if shape != self.shape:
            raise ValueError(
                f"training: images must be [N, {', '.join(map(str, self.shape))}] "
                f"as the recipe says, got [N, {', '.join(map(str, shape))}]"
            )
        recipe = self.recipe
        if not recipe.conditional:
            return recipe
        if samples.labels is None:
            raise ValueError(
                f"training: a conditional run must have labels, {samples.name} has none; put the images into a folder "
                "for each class, or give --labels FILE.csv"
            )
        count = len(samples.classes or [])
        if count < 2 or recipe.classes not in (0, count):
            wanted = recipe.classes or "at least 2"
            raise ValueError(f"training: the images must have {wanted} classes, {samples.name} has {count}")
        return recipe.replace(classes=count)

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W]"""
        return self.recipe.channels, self.recipe.image_size, self.recipe.image_size

    def step(self, generator: nn.Module, discriminator: nn.Module) -> dict[str, Any]:
        """With the penalty on path lengths, where the recipe has it."""
        own, recipe = super().step(generator, discriminator), self.recipe
        if not recipe.path_length:
            return own
        return own | {
            "extra_g_loss": PathLength(generator, recipe.path_length),
            "extra_g_every": recipe.path_length_every,
        }

    def pictures(self, made: Tensor) -> Tensor:
        """The samples themselves: they are pictures already."""
        return made

    def judge(self, samples: data.ImageSet) -> FeatureJudge:
        """Kernel and Frechet distance on the backbone "small"."""
        recipe = self.recipe
        count = len(self.given(samples).z)
        labels = samples.labels if recipe.conditional else None
        return FeatureJudge(samples.images, recipe.latent, recipe.seed + 2, count, labels)

    def health(self, samples: data.ImageSet, held: data.ImageSet | None) -> Health:
        """Variety and coverage beside the training images."""
        return Health(samples, held, labelled=self.recipe.conditional)

    def compare(self, directory: RunDirectory, samples: Any, made: Tensor, columns: int | None) -> str:
        """pictures/real.png, pictures/nearest.png and how far samples are from their nearest training images."""
        return compare_with_images(directory, samples.images, made, columns)


class PathLength:
    """A generator's weighted `path_length_penalty` at half of the step's latents, as StyleGAN2's authors take it."""

    reads_d_real = False

    def __init__(self, generator: Any, weight: float):
        self.generator, self.weight = generator, weight

    def __call__(self, outputs: Outputs) -> Tensor:
        half = slice(0, (len(outputs.z) + 1) // 2)
        labels = None if outputs.labels is None else outputs.labels[half]
        penalty: Tensor = self.generator.path_length_penalty(outputs.z[half], labels)
        return self.weight * penalty
