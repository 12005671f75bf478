"""Pictures from pictures, with pairs: the generator is given a source and judged by what it makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from fastgan import data
from fastgan.data.pairs import PairSet, load_pairs
from fastgan.metrics import features, kernel_distance, load_backbone
from fastgan.training import sampling
from fastgan.training.health import LOOKED_AT, Health
from fastgan.training.outputs import Outputs
from fastgan.training.recipes import Recipe
from fastgan.training.rundir import RunDirectory

from .domain import Domain, Given

__all__ = ["Pairs", "Translating", "in_rows", "normalised", "sheet"]

COLUMNS = 8  # of a sheet
NO_LATENTS: tuple[()] = ()  # the generator's input is the source alone, which a step hands to both networks


def normalised(pictures: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pictures.to(torch.float32).div_(127.5).sub_(1.0)


def in_rows(count: int, wanted: int) -> Tensor:
    """At most `wanted` of the numbers below count, evenly spread, and whole rows of 8 of them where there are more."""
    some = min(count, wanted)
    return sampling.evenly(count, some - some % COLUMNS if some > COLUMNS else some)


def sheet(rows: Sequence[Tensor]) -> Tensor:
    """Pictures [K N, C, H, W] in the order of a grid of 8 columns: K rows with the same 8 pictures, then the next 8.

    rows: K tensors [N, 1 or C, H, W], with N at most 8 or a multiple of it.
    """
    channels = max(pictures.shape[1] for pictures in rows)
    wide = [pictures.float().expand(-1, channels, -1, -1) for pictures in rows]
    return torch.cat([part for parts in zip(*(w.split(COLUMNS) for w in wide), strict=True) for part in parts])


class Translating(Domain):
    """What domains of pictures from pictures have in common: no latents, and `fastgan translate`."""

    noun = "pairs"

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        if recipe.conditional or recipe.augment or recipe.instance_noise:
            raise ValueError(
                f"recipe: {recipe.name} compares pictures with their sources, conditional, augment and instance_noise "
                "must be left out"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W] of a target."""
        return self.recipe.channels, self.recipe.image_size, self.recipe.image_size

    @property
    def source_channels(self) -> int:
        """Of a source."""
        return int(self.option.get("source_channels") or self.recipe.channels)

    def require_latents(self, command: str) -> None:
        """Raises ValueError: there are no latents."""
        raise ValueError(f"{command}: {self.recipe.name} makes pictures from pictures, use fastgan translate --run DIR")

    def sample(self, generator: Any, config: Any, count: int, **options: Any) -> Any:
        """Raises ValueError: there are no latents to draw."""
        self.require_latents("sample")

    def translator(self, generator: nn.Module, direction: str | None) -> tuple[nn.Module, int]:
        """(a network that takes pictures of one side, their channels); direction: "ab", "ba" or None for the run's own.

        Raises ValueError for a direction that was not trained.
        """
        raise NotImplementedError


class Pairs(Translating):
    """Pairs of pictures; the discriminator sees a picture beside its source, and the loss holds it near its target.

    domain_options: `made`, `direction` and `source_channels` as in `fastgan.data.pairs.load_pairs` (0 channels: as many
    as the target's); `l1`: the weight of the distance to the target.
    """

    name = "pairs"
    metrics = ("l1", "kcd")
    charts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "Distance to the targets": {"l1": "mean absolute difference, of [-1, 1]"},
        "Kernel distance": {"kcd": "kcd, features of small; lower is nearer"},
    }
    options: ClassVar[Mapping[str, Any]] = {"made": "auto", "direction": "ab", "source_channels": 0, "l1": 100.0}

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        if (channels := self.option.get("source_channels", 0)) not in (0, 1, 3):
            raise ValueError(f"recipe: domain_options.source_channels must be 0, 1 or 3, got {channels}")
        self._held: PairSet | None = None
        self._shown: tuple[Tensor, Tensor] | None = None  # sources and targets of the grid

    # ---- data -----------------------------------------------------------------------------------------------------

    def load(self, device: torch.device) -> PairSet:
        """See `load_pairs`."""
        sizes: Any = dict(image_size=self.recipe.image_size, channels=self.recipe.channels)
        how: Any = dict(made=self.option["made"], direction=self.option["direction"])
        return load_pairs(self.recipe.data, **sizes, **how, source_channels=self.source_channels, device=device)

    def fit(self, samples: Any) -> Recipe:
        """The recipe; ValueError where the pairs have other sizes."""
        wanted = self.source_channels + self.recipe.channels, *self.shape[1:]
        found = tuple(samples.values.shape[1:])
        if not isinstance(samples, PairSet) or found != wanted:
            raise ValueError(
                f"training: pairs must be a PairSet [N, {', '.join(map(str, wanted))}], {self.source_channels} "
                f"channels of the source first, got {type(samples).__name__} [N, {', '.join(map(str, found))}]"
            )
        return self.recipe

    def hold_out(self, samples: PairSet, count: int) -> tuple[PairSet, PairSet | None]:
        """As in every domain; grids and scores are then of the pairs that are kept back."""
        learnt, self._held = super().hold_out(samples, count)
        return learnt, self._held

    # ---- training -------------------------------------------------------------------------------------------------

    def step(self, generator: nn.Module, discriminator: nn.Module) -> dict[str, Any]:
        """The L1 loss of Isola et al. 2017, equation 4."""
        return {"latent": lambda n, device, rng: NO_LATENTS, "extra_g_loss": TargetDistance(float(self.option["l1"]))}

    def inputs(self, drawn: Sequence[tuple[Tensor, Any]]) -> tuple[Any, Any, Any]:
        """(targets, sources as what both networks are told, no latents)."""
        cut = self.source_channels
        layout: Any = dict(memory_format=torch.channels_last)
        targets = [x[:, cut:].contiguous(**layout) for x, _ in drawn]
        return targets, [x[:, :cut].contiguous(**layout) for x, _ in drawn], [NO_LATENTS] * len(drawn)

    def probe(self, device: torch.device | str) -> Any:
        """A batch of random planes, sources first."""
        size = self.recipe.image_size
        shape = self.recipe.batch_size, self.source_channels + self.recipe.channels, size, size
        x = torch.empty(shape, device=device) if str(device) == "meta" else (torch.rand(shape) * 2 - 1).to(device)
        return x, None

    # ---- looking --------------------------------------------------------------------------------------------------

    def given(self, samples: PairSet) -> Given:
        """Sources, evenly over the pairs that were held out, or over all."""
        of = self._held or samples
        of = of.select(in_rows(len(of), self.recipe.sample_count))
        self._shown = normalised(of.sources).cpu(), normalised(of.targets).cpu()
        return Given(self._shown[0], None, min(COLUMNS, len(of)))

    def pictures(self, made: Tensor) -> Tensor:
        """Sources, what was made of them, and targets, in rows of 8."""
        if self._shown is None or len(self._shown[0]) != len(made):
            return made
        return sheet([self._shown[0], made, self._shown[1]])

    def judge(self, samples: PairSet) -> PairJudge:
        """Distance to the targets, and between all that was made and all targets."""
        return PairJudge(self._held or samples)

    def health(self, samples: PairSet, held: PairSet | None) -> Health:
        """Variety and coverage beside the targets, and with pairs that were held out whether D knows its own."""
        return PairHealth(samples, held)

    def compare(self, directory: RunDirectory, samples: PairSet, made: Tensor, columns: int | None) -> str:
        """pictures/real.png: pairs of the training set."""
        some = samples.select(in_rows(len(samples), 2 * COLUMNS))
        rows = [normalised(some.sources).cpu(), normalised(some.targets).cpu()]
        data.save_grid(sheet(rows), directory.pictures / "real.png", columns=min(COLUMNS, len(some)))
        return ""

    # ---- fastgan translate ----------------------------------------------------------------------------------------

    def translator(self, generator: nn.Module, direction: str | None) -> tuple[nn.Module, int]:
        """The generator, in the one direction that it was trained for."""
        if direction not in (None, self.option["direction"]):
            raise ValueError(
                f"translate: --direction must be {self.option['direction']}, the one that {self.recipe.name} was "
                f"trained for, got {direction}"
            )
        return generator, self.source_channels


class PairHealth(Health):
    """`Health` of translations, whose discriminator sees a picture beside its source."""

    def __init__(self, pairs: PairSet, held: PairSet | None):
        targets = lambda of: data.ImageSet(of.targets, device=of.device)
        super().__init__(targets(pairs), None if held is None else targets(held), labelled=False)
        at = sampling.evenly(len(pairs), LOOKED_AT).to(pairs.sources.device)
        self._labels = normalised(pairs.sources[at])
        self._held_labels = None if held is None else normalised(held.sources[:LOOKED_AT])

    def _told(self, z: Tensor, labels: Tensor | None) -> Tensor:
        return z  # the sources


class TargetDistance:
    """The weighted L1 distance of what was made to the target."""

    reads_d_real = False

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, outputs: Outputs) -> Tensor:
        return self.weight * l1_loss(outputs.fake.to(outputs.real.dtype), outputs.real)


class PairJudge:
    """Scores of translations of `pairs`: those that were held out, where some were.

    l1   mean absolute difference from the targets, of values in [-1, 1]
    kcd  kernel distance between the features of all translations and of all targets, on the backbone "small"
    """

    metric, words, batch = "l1", "distance to the targets", 16

    def __init__(self, pairs: PairSet):
        self._pairs, self._backbone, self.available = pairs, load_backbone(), len(pairs)
        self.identity = f"translations beside their targets, features of {self._backbone.identity}"

    def make(self, generator: nn.Module, count: int) -> tuple[Tensor, Tensor]:
        """(translations, targets), evenly over the pairs."""
        of = self._pairs.select(torch.linspace(0, len(self._pairs) - 1, count).round().long())
        made = sampling.draw(generator, normalised(of.sources), batch=self.batch)
        return made, normalised(of.targets).cpu()

    def score(self, made: tuple[Tensor, Tensor], count: int) -> dict[str, float]:
        """l1, and kcd from two pairs on."""
        pictures, targets = made
        if not pictures.isfinite().all():
            return {}
        scores = {"l1": float(l1_loss(pictures, targets))}
        if count > 1:
            real, fake = features(data.to_uint8(targets), self._backbone), features(pictures, self._backbone)
            scores["kcd"] = kernel_distance(real, fake)
        return scores
