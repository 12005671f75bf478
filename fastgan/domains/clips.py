"""Clips: short films of square frames, shown as strips and as animations."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fastgan import data
from fastgan._writing import atomic_file, target_of
from fastgan.data.clips import DEMONSTRATION, ClipSet, load_clips
from fastgan.data.films import require_ffmpeg, save_mp4
from fastgan.metrics import features, load_backbone
from fastgan.training.evaluation import MOST, NAMES, FeatureJudge
from fastgan.training.figures import figure
from fastgan.training.health import Health
from fastgan.training.recipes import Recipe
from fastgan.training.rundir import RunDirectory

from .domain import Domain
from .sound import some_of

__all__ = ["Clips", "motion_pictures"]

PACE = 120  # milliseconds a frame
LEAST = 48  # frames of a film: short clips are shown several times, since a player does not repeat them
TILE = 64  # pixels of a frame in an animation, at least
LUMINANCE = (0.299, 0.587, 0.114)


class Clips(Domain):
    """Clips of so many frames, as [frames, channels, image_size, image_size] in [-1, 1]."""

    name = "clips"
    noun = "clips"
    narrow = 0.1  # in its first 343 steps clip-32 had 0.16 to 0.50
    metrics = tuple(NAMES)
    charts: ClassVar = {
        "Kernel distance": {"kcd": "kcd of three frames as colours, features of small; lower is nearer"}
    }
    options: ClassVar = {"frames": 8}
    least: ClassVar = {"frames": 1}
    sets: ClassVar = {DEMONSTRATION: "2,000 clips of garments of Fashion-MNIST that move and bounce"}

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        if recipe.augment:
            raise ValueError(f"recipe: augment must be off for clips, got {recipe.augment!r}")

    def load(self, device: torch.device) -> ClipSet:
        """What `fastgan.data.clips.load_clips` reads."""
        recipe = self.recipe
        size, channels = recipe.image_size, recipe.channels
        return load_clips(recipe.data, **self.option, image_size=size, channels=channels, device=device)

    @property
    def shape(self) -> tuple[int, ...]:
        """[T, C, H, W]"""
        return self.option["frames"], self.recipe.channels, self.recipe.image_size, self.recipe.image_size

    # ---- looking --------------------------------------------------------------------------------------------------

    def pictures(self, made: Tensor) -> Tensor:
        """Strips of frames, [N, C, H, T W]."""
        return made.permute(0, 2, 3, 1, 4).flatten(3)

    def write(self, made: Tensor, path: Path, columns: int | None) -> None:
        """Strips to `path`, and all clips moving, as .gif, beside it."""
        super().write(made, path, 2)
        save_gif(made, path.with_suffix(".gif"), columns)

    def show(self, path: Path, caption: str, kind: str = "") -> str:
        """The clips, moving."""
        beside = path.with_suffix(".gif")
        if not beside.exists():
            return super().show(path, caption, kind)
        moving = base64.b64encode(beside.read_bytes()).decode()
        return figure(f'<img src="data:image/gif;base64,{moving}" alt="{html.escape(caption)}">', caption, kind)

    def judge(self, samples: ClipSet) -> FeatureJudge:
        """Kernel and Frechet distance of `motion_pictures` on the backbone "small"."""
        recipe = self.recipe
        real = data.to_uint8(motion_pictures(some_of(samples, MOST)))
        return FeatureJudge(real, recipe.latent, recipe.seed + 2, recipe.sample_count, look=motion_pictures)

    def health(self, samples: ClipSet, held: ClipSet | None) -> Health:
        """Variety and coverage of `motion_pictures` beside those of the training clips."""
        return Health(samples, held, look=lambda made: features(motion_pictures(made), load_backbone()))

    def compare(self, directory: RunDirectory, samples: ClipSet, made: Tensor, columns: int | None) -> str:
        """pictures/real.png and real.gif."""
        self.write(some_of(samples, len(made)), directory.pictures / "real.png", columns)
        return ""

    # ---- fastgan sample -------------------------------------------------------------------------------------------

    def check_out(self, out: str | None) -> None:
        """A .gif, an .mp4, or a .png of strips."""
        if out is None or Path(out).suffix.lower() not in (".gif", ".mp4", ".png"):
            raise ValueError(f"sample: --out must end in .gif, .mp4 or .png, got {out}")
        if Path(out).suffix.lower() == ".mp4":
            require_ffmpeg("sample")
        target_of(out)

    def save(self, made: Tensor, out: str | None, columns: int | None) -> None:
        """An animation, a film, or strips."""
        path = Path(out or "")
        if path.suffix.lower() == ".gif":
            save_gif(made, path, columns)
        elif path.suffix.lower() == ".mp4":
            film = [page.expand(-1, -1, 3) for page in pages(made, columns)]
            save_mp4(film * -(-LEAST // len(film)), path, fps=1000 / PACE)
        else:
            data.save_grid(self.pictures(made), path, columns=columns or 2)


def motion_pictures(clips: Tensor) -> Tensor:
    """Three frames of a clip as the three colours of a picture: [N, T, C, H, W] to [N, 3, H, W].

    They are those at a quarter, half and three quarters of the clip. What stands still is grey, what moves has coloured
    edges, so that a distance between such pictures sees both what frames look like and how they move.
    """
    count = clips.shape[1]
    some = clips[:, [count // 4, count // 2, 3 * count // 4]]
    if clips.shape[2] == 1:
        return some[:, :, 0]
    return (some * some.new_tensor(LUMINANCE)[:, None, None]).sum(2)


def pages(clips: Tensor, columns: int | None) -> Iterator[Tensor]:
    """Clips [N, T, C, H, W] in [-1, 1] beside each other: T pictures [height, width, C] uint8, frames of at least 64
    pixels a side for up to 16 clips."""
    scale = max(1, -(-TILE // clips.shape[-1])) if len(clips) <= 16 else 1
    for frame in clips.unbind(1):
        page = data.make_grid(frame, columns=columns, padding=1)
        yield page.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0)


def save_gif(clips: Tensor, path: Path, columns: int | None) -> None:
    """The `pages` of clips as one animation that goes on for ever."""
    from PIL import Image

    first, *rest = [
        Image.fromarray((page[..., 0] if page.shape[2] == 1 else page).contiguous().numpy())
        for page in pages(clips, columns)
    ]
    with atomic_file(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=PACE, loop=0)
