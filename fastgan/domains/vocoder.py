"""Sounds from their mel spectrograms: a vocoder, judged by what it makes of sounds that were held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import data
from fastgan.data.sounds import DEMONSTRATION_RATE, SoundSet, load_sounds
from fastgan.metrics import features, kernel_distance, load_backbone
from fastgan.training import sampling
from fastgan.training.health import Health
from fastgan.training.outputs import Outputs
from fastgan.training.recipes import Recipe

from .domain import Given
from .mel import WINDOWS, MelSpectrogram
from .pairs import COLUMNS, in_rows, sheet
from .sound import Sound, spectrograms

__all__ = ["Vocoder"]


class Vocoder(Sound):
    """Sounds, and a generator that is given their mel spectrograms.

    domain_options: `length` and `rate` as for every sound; `bands`, `hop` and `floor` of the spectrogram
    (`MelSpectrogram`); `mel` and `matching`, the weights of the losses of Kong et al. 2020 (arXiv:2010.05646),
    equations 3 and 4; `resolutions`: the windows of the mel loss, in those of the spectrogram. Theirs is (1,); several,
    with bands in proportion, are of Kumar et al. 2023 (arXiv:2306.06546).
    """

    name = "vocoder"
    metrics = ("mel", "kcd")
    charts: ClassVar = {
        "Distance of spectrograms": {"mel": "mean absolute difference of log mel bands"},
        "Kernel distance": {"kcd": "kcd of spectrograms, features of small; lower is nearer"},
    }
    options: ClassVar = {
        **Sound.options,
        **{"bands": 40, "hop": 64, "floor": 0.01},
        **{"mel": 45.0, "matching": 2.0, "resolutions": (0.25, 1.0, 4.0)},
    }

    least: ClassVar = {**Sound.least, "bands": 1, "hop": 1}

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        if recipe.instance_noise:
            raise ValueError(f"recipe: {recipe.name} compares sounds with their spectrograms, instance_noise must be 0")
        if self.option["length"] % self.option["hop"]:
            hop, length = self.option["hop"], self.option["length"]
            raise ValueError(f"recipe: domain_options.length must be a multiple of hop {hop}, got {length}")
        self._check_spectrograms()
        self._held: SoundSet | None = None
        self._shown: Tensor | None = None  # sounds of the grid

    def _check_spectrograms(self) -> None:
        floor, shares, length = (self.option[name] for name in ("floor", "resolutions", "length"))
        if self.option["bands"] > 2 * self.option["hop"]:  # a window of 4 hops has no more frequencies
            raise ValueError(
                f"recipe: domain_options.bands must be at most twice the hop, {2 * self.option['hop']}, "
                f"got {self.option['bands']}"
            )
        if not floor > 0:
            raise ValueError(f"recipe: domain_options.floor must be above 0, got {floor}")
        if not isinstance(shares, list | tuple) or not shares:
            raise ValueError(f"recipe: domain_options.resolutions must be some numbers, such as (1,), got {shares!r}")
        longest = max(look.reflected for look in self.compared)
        if longest >= length:
            raise ValueError(
                f"recipe: domain_options.length must be above {longest} for these resolutions, got {length}"
            )

    @property
    def spectrogram(self) -> MelSpectrogram:
        """Of the recipe's sounds."""
        option = self.option
        sizes = {name: option[name] for name in ("bands", "hop", "floor")}
        return MelSpectrogram(option["rate"] or DEMONSTRATION_RATE, **sizes)

    @property
    def compared(self) -> list[MelSpectrogram]:
        """What the mel loss compares sounds by. A tone is as far above the floor in a long window as in a short one."""
        own = self.spectrogram
        return [own.with_windows(share) for share in self.option["resolutions"]]

    # ---- data -----------------------------------------------------------------------------------------------------

    def load(self, device: torch.device) -> SoundSet:
        """As for every kind of sound."""
        sounds = {name: self.option[name] for name in Sound.options}
        return load_sounds(self.recipe.data, **sounds, device=device)

    def hold_out(self, samples: SoundSet, count: int) -> tuple[SoundSet, SoundSet | None]:
        """As in every domain; grids and scores are then of the sounds that are kept back."""
        learnt, self._held = super().hold_out(samples, count)
        return learnt, self._held

    # ---- training -------------------------------------------------------------------------------------------------

    def step(self, generator: nn.Module, discriminator: nn.Module) -> dict[str, Any]:
        """Feature matching and the distance of spectrograms."""
        # the authors' LSGAN is the plain square, gan_loss is half of it: so the weights here are halved
        share = 0.5 if self.recipe.loss == "lsgan" else 1.0
        loss = SoundLoss(self.compared, share * self.option["mel"], share * self.option["matching"])
        return {"latent": lambda n, device, rng: None, "extra_g_loss": loss}

    def inputs(self, drawn: Sequence[tuple[Tensor, Any]]) -> tuple[Any, Any, Any]:
        """(sounds, no labels, their spectrograms)."""
        real, spectrogram = [sounds for sounds, _ in drawn], self.spectrogram
        return real, None, [spectrogram(sounds) for sounds in real]

    # ---- looking --------------------------------------------------------------------------------------------------

    def given(self, samples: SoundSet) -> Given:
        """Spectrograms, evenly over the sounds that were held out, or over all."""
        of = self._held or samples
        self._shown = of.pick(in_rows(len(of), self.recipe.sample_count).to(of.values.device)).cpu()
        return Given(self.spectrogram(self._shown), None, min(COLUMNS, len(self._shown)))

    def pictures(self, made: Tensor) -> Tensor:
        """Spectrograms of the sounds of the grid and of what was made, in rows of 8."""
        found = spectrograms(made[:, 0])
        if self._shown is None or len(self._shown) != len(made):
            return found
        return sheet([spectrograms(self._shown[:, 0]), found])

    def judge(self, samples: SoundSet) -> MelJudge:  # type: ignore[override]
        """Distance to the spectrograms that were given, and between those of all sounds."""
        return MelJudge(self._held or samples, self.spectrogram)

    def health(self, samples: SoundSet, held: SoundSet | None) -> Health:
        """As of every kind of sound. What is held out is judged by `mel`, not by the discriminators."""
        return super().health(samples, None)

    def require_latents(self, command: str) -> None:
        """Raises ValueError: there are no latents."""
        raise ValueError(f"{command}: {self.recipe.name} makes sounds from spectrograms, it has no latents")

    def sample(
        self, generator: nn.Module, config: Mapping[str, Any], count: int, *, seed: int = 0, **options: Any
    ) -> tuple[Tensor, int | None]:
        """(sounds of the recipe's data made again from their spectrograms, None); seed: which sounds."""
        for name, value in options.items():
            if value is not None:
                raise ValueError(f"sample: --{name} must be left out, {self.recipe.name} has no latents and no classes")
        samples = self.load(torch.device("cpu"))
        some = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count]
        return self.draw(generator, self.spectrogram(samples.pick(some)), None), None

    # ---- fastgan translate ----------------------------------------------------------------------------------------

    def made_again(self, generator: nn.Module, sound: Tensor) -> Tensor:
        """A sound [samples] of any length at the recipe's rate, made from its own spectrogram; of the same length."""
        hop, length = self.option["hop"], len(sound)
        # whole hops, and no less than the edges that a spectrogram reflects
        filled = F.pad(sound, (0, max(-length % hop, WINDOWS // 2 * hop - length)))
        return self.draw(generator, self.spectrogram(filled[None, None]), None)[0, 0, :length]


class SoundLoss:
    """How far the features and the spectrograms of what was made are from those of the real sounds."""

    def __init__(self, spectrograms: Sequence[MelSpectrogram], mel: float, matching: float):
        self.spectrograms, self.mel, self.matching = spectrograms, mel, matching

    def __call__(self, outputs: Outputs) -> Tensor:
        made, real = outputs.fake.float(), outputs.real.float()
        distances = [F.l1_loss(look(made), look(real)) for look in self.spectrograms]
        found = self.mel * torch.stack(distances).mean()
        for real, fake in zip(outputs.d_real[1], outputs.d_fake[1], strict=True):
            for a, b in zip(real, fake, strict=True):
                found = found + self.matching * F.l1_loss(b.float(), a.float())
        return found


class MelJudge:
    """Scores of what the generator makes of the spectrograms of `samples`: those that were held out, where some were.

    mel  mean absolute difference between the log mel bands of what was made and of the sounds
    kcd  kernel distance between their spectrograms, on the backbone "small"
    """

    metric, words, batch = "mel", "distance of spectrograms", 16

    def __init__(self, samples: SoundSet, spectrogram: MelSpectrogram):
        self._samples, self._spectrogram, self._backbone = samples, spectrogram, load_backbone()
        self.identity = f"sounds beside what is made of their spectrograms, features of {self._backbone.identity}"
        self.available = len(samples)

    def make(self, generator: nn.Module, count: int) -> tuple[Tensor, Tensor]:
        """(made, sounds), evenly over them."""
        at = torch.linspace(0, len(self._samples) - 1, count).round().long()
        real = self._samples.pick(at.to(self._samples.values.device)).cpu()
        return sampling.draw(generator, self._spectrogram(real), batch=self.batch), real

    def score(self, made: tuple[Tensor, Tensor], count: int) -> dict[str, float]:
        """mel, and kcd from two sounds on."""
        sounds, real = made
        if not sounds.isfinite().all():
            return {}
        scores = {"mel": float(F.l1_loss(self._spectrogram(sounds), self._spectrogram(real)))}
        if count > 1:
            looks = (features(data.to_uint8(spectrograms(x[:, 0])), self._backbone) for x in (real, sounds))
            scores["kcd"] = kernel_distance(*looks)
        return scores
