"""A run that takes a fraction of a second, and what makes two runs the same."""

from __future__ import annotations

import torch

from fastgan.data.imageset import ImageSet
from fastgan.training.recipes import Recipe
from fastgan.training.trainer import Trainer

TINY = Recipe(
    name="tiny",
    model="dcgan-28",
    model_options={"g_width": 2, "d_width": 3},
    image_size=8,
    channels=1,
    latent=5,
    batch_size=4,
    steps=6,
    ema=0.9,
    flip=True,
    sample_count=4,
    sample_every=2,
    checkpoint_every=2,
    log_every=1,
)


def noise(seed: int = 0) -> ImageSet:
    """Ten grey pictures of 8x8."""
    pixels = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ImageSet(pixels, name="noise")


def trainer(images, out, recipe=TINY, **options) -> Trainer:
    return Trainer(recipe, out=out, device="cpu", images=images, quiet=True, **options)


def tensors(value, path=""):
    """Every tensor and number in a nested state, by path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}[{index}]")
    else:
        yield path, value


def assert_same_state(a: Trainer, b: Trainer) -> None:
    left, right = (dict(tensors(t.state())) for t in (a, b))
    for state in (left, right):
        for key in [k for k in state if k.startswith((".seconds", ".config", ".winners"))]:
            del state[key]
    assert left.keys() == right.keys()
    for key, value in left.items():
        same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        assert same, key
