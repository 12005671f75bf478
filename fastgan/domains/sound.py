"""Sounds: raw waveforms from files and from the generator, shown as spectrograms."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fastgan import data
from fastgan._writing import atomic_file, target_of
from fastgan.data.sounds import DEMONSTRATION, SoundSet, load_sounds, save_wav
from fastgan.metrics import features, load_backbone
from fastgan.training.evaluation import MOST, NAMES, FeatureJudge
from fastgan.training.figures import figure
from fastgan.training.health import Health
from fastgan.training.recipes import Recipe
from fastgan.training.rundir import RunDirectory
from fastgan.training.sampling import evenly

from .domain import Domain

__all__ = ["Sound", "some_of", "spectrograms"]

WINDOW, HOP = 256, 64  # samples
FLOOR = 80  # decibels below full scale that are black
HEARD, GAP = 12, 0.1  # sounds that a report plays in a row, and seconds between them


class Sound(Domain):
    """Sounds of `length` numbers at `rate` Hz, as [1, length] in [-1, 1]."""

    name = "sound"
    noun = "sounds"
    # Of the demonstration's sounds the mean deviation is 0.1, of silence 0.
    flat = 0.002
    metrics = tuple(NAMES)
    charts: ClassVar = {"Kernel distance": {"kcd": "kcd of spectrograms, features of small; lower is nearer"}}
    options: ClassVar = {"length": 4096, "rate": 0}
    least: ClassVar = {"length": WINDOW // 2 + 1}  # what the spectrogram's first window needs
    sets: ClassVar = {DEMONSTRATION: "1,200 drum sounds at 8 kHz, made from formulas"}

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        for field in ("flip", "augment"):
            if getattr(recipe, field):
                raise ValueError(f"recipe: {field} must be off for sounds, got {getattr(recipe, field)!r}")

    def load(self, device: torch.device) -> SoundSet:
        """What `fastgan.data.sounds.load_sounds` reads."""
        return load_sounds(self.recipe.data, **self.option, device=device)

    def fit(self, samples: SoundSet) -> Recipe:
        """The recipe with the rate of the sounds."""
        length, rate = self.option["length"], self.option["rate"]
        if samples.values.shape[1] != length or rate not in (0, samples.rate):
            got = f"{samples.values.shape[1]} at {samples.rate}"
            raise ValueError(f"training: sounds must be of {length} samples at {rate or 'any'} Hz, got {got}")
        return self.recipe.replace(domain_options={**self.option, "rate": samples.rate})

    @property
    def shape(self) -> tuple[int, ...]:
        """[1, length]"""
        return 1, self.option["length"]

    # ---- looking --------------------------------------------------------------------------------------------------

    def pictures(self, made: Tensor) -> Tensor:
        """Their spectrograms."""
        return spectrograms(made[:, 0])

    def write(self, made: Tensor, path: Path, columns: int | None) -> None:
        """Spectrograms to `path`, and the first sounds in a row beside it as .wav."""
        super().write(made, path, columns)
        gap = torch.zeros(round(GAP * self.option["rate"]))
        row = torch.cat([part for sound in made[:HEARD, 0] for part in (sound, gap)])
        with atomic_file(path.with_suffix(".wav")) as file:
            save_wav(row, self.option["rate"], file)

    def show(self, path: Path, caption: str, kind: str = "") -> str:
        """The spectrograms, and the sounds to be played."""
        beside = path.with_suffix(".wav")
        if not beside.exists():
            return super().show(path, caption, kind)
        sound = base64.b64encode(beside.read_bytes()).decode()
        image = base64.b64encode(path.read_bytes()).decode()
        content = (
            f'<img src="data:image/png;base64,{image}" alt="{html.escape(caption)}">'
            f'<audio controls src="data:audio/wav;base64,{sound}"></audio>'
        )
        return figure(content, f"{caption}; the first {HEARD} in a row", kind)

    def judge(self, samples: SoundSet) -> FeatureJudge:
        """Kernel and Frechet distance of spectrograms on the backbone "small"."""
        recipe = self.recipe
        real = data.to_uint8(self.pictures(some_of(samples, MOST)))
        return FeatureJudge(real, recipe.latent, recipe.seed + 2, recipe.sample_count, look=self.pictures)

    def health(self, samples: SoundSet, held: SoundSet | None) -> Health:
        """Variety and coverage of spectrograms beside those of the training sounds."""
        return Health(samples, held, look=lambda made: features(spectrograms(made[:, 0]), load_backbone()))

    def compare(self, directory: RunDirectory, samples: SoundSet, made: Tensor, columns: int | None) -> str:
        """pictures/real.png and its sounds."""
        self.write(some_of(samples, len(made)), directory.pictures / "real.png", columns)
        return ""

    # ---- fastgan sample -------------------------------------------------------------------------------------------

    def check_out(self, out: str | None) -> None:
        """A folder for .wav files, or a .png for spectrograms."""
        suffix = Path(out or "").suffix.lower()
        if out is None or suffix not in ("", ".png"):
            raise ValueError(f"sample: --out must be a folder for .wav files, or end in .png, got {out}")
        if suffix:
            target_of(out)
        elif Path(out).exists() and not Path(out).is_dir():
            raise ValueError(f"sample: --out must be a folder for .wav files, {out} is a file")

    def save(self, made: Tensor, out: str | None, columns: int | None) -> None:
        """A .wav a sound into the folder, or their spectrograms and the first sounds."""
        path = Path(out or "")
        if path.suffix:
            self.write(made, path, columns)
            return
        for number, sound in enumerate(made[:, 0], 1):
            with atomic_file(path / f"{number:0{len(str(len(made)))}}.wav") as file:
                save_wav(sound, self.option["rate"], file)


def spectrograms(sounds: Tensor) -> Tensor:
    """Decibels of floats [N, samples] in [-1, 1] as pictures [N, 1, frequencies, times], -80 dB black and 0 dB white.

    A Hann window of 256 samples, moved by 64; a full-scale sine is 0 dB. High frequencies are above.
    """
    window = torch.hann_window(WINDOW)
    found = torch.stft(sounds.float().cpu(), WINDOW, HOP, window=window, return_complex=True)
    decibels = 20 * torch.log10(found.abs() * 2 / window.sum() + 1e-9)
    return (2 * decibels / FLOOR + 1).clamp(-1, 1).flip(1)[:, None, 1:]


def some_of(samples: data.Samples, count: int) -> Tensor:
    """At most `count` samples evenly over the set, on the CPU."""
    return samples.pick(evenly(len(samples), count).to(samples.values.device)).cpu()
