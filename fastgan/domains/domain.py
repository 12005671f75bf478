"""What a run is about: how samples are loaded, batched, given to the step, drawn, written and shown.

The training loop knows samples as tensors alone; everything else it asks the run's `Domain`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastgan import data
from fastgan._writing import target_of
from fastgan.training import sampling
from fastgan.training.evaluation import Judge
from fastgan.training.figures import picture
from fastgan.training.recipes import Recipe
from fastgan.training.rundir import RunDirectory

__all__ = ["Domain", "Given", "Looks", "Stream"]


# Options are of their default's kind, where it is one of these; whole numbers are counts, of which no recipe has a use
# for more than MOST.
KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
MOST = 1 << 24


class Given(NamedTuple):
    """The fixed inputs that a run's sample grids are drawn from.

    z: [N, ...]. labels: int64 [N] or None. columns: samples a row of the grid, or None for about a square.
    """

    z: Tensor
    labels: Tensor | None = None
    columns: int | None = None


class Stream(Protocol):
    """An endless, resumable iterator over batches, such as `fastgan.data.Batches`."""

    def __next__(self) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next batch depends on, as CPU tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any], *, changed: bool = False) -> None:
        """Go on where `state` was taken; changed: the samples are others, so a new epoch begins."""


class Looks(Protocol):
    """What finds a collapse that losses do not show, such as `fastgan.training.health.Health`."""

    def look(
        self, generator: nn.Module, discriminator: nn.Module, z: Tensor, labels: Tensor | None
    ) -> dict[str, float]:
        """Numbers for the log, "diversity" and "coverage" among them where they mean something."""


class Domain:
    """Samples of one kind, for the run of one recipe. The defaults fit floats [N, *shape] made from normal latents.

    A subclass gives `load`, `shape` and `pictures`, and whatever else its samples have of their own.

    Class attributes:
        name: what a recipe's field `domain` says.
        noun: what samples are called in messages.
        flat: drawn samples whose standard deviation is below this have collapsed to one.
        narrow: samples whose variety in `health` is below this share of the data's are of few kinds.
        metrics: the judge's scores, the one that chooses the best generator first.
        charts: of the report, title to {key of log.jsonl: its name}.
        options: the fields of a recipe's `domain_options`, with their defaults.
        least: of options that are numbers, where that is not 0.
        sets: names of data that are part of the package, beside those of `fastgan.data.available`; what each is.
    """

    name: ClassVar[str]
    noun: ClassVar[str] = "samples"
    flat: ClassVar[float] = 0.01
    narrow: ClassVar[float] = 0.2
    metrics: ClassVar[Sequence[str]] = ()
    charts: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    options: ClassVar[Mapping[str, Any]] = {}
    least: ClassVar[Mapping[str, int]] = {}
    sets: ClassVar[Mapping[str, str]] = {}

    progress: Callable[[int, int], None] | None = None  # of `load`: samples read and in all

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        for key in recipe.domain_options:
            if key not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"recipe: domain_options of {self.name} are {known}, got {key!r}")
        self.option = {**self.options, **recipe.domain_options}
        for key, default in self.options.items():
            self._check_option(key, type(default), self.option[key])

    def _check_option(self, key: str, kind: Any, value: Any) -> None:
        """Raise ValueError for a value that is not of the kind of its default, or a number out of bounds."""
        if kind not in KINDS:
            return
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"recipe: domain_options.{key} must be {KINDS[kind]}, got {value!r}")
        least, most = self.least.get(key, 0), float(MOST) if kind is int else math.inf
        if kind in (int, float) and not (least <= value <= most and value < math.inf):
            above = f" and at most {most:,.0f}" if kind is int else ""
            raise ValueError(f"recipe: domain_options.{key} must be at least {least}{above}, got {value}")

    # ---- data -----------------------------------------------------------------------------------------------------

    def absolute(self) -> Recipe:
        """The recipe with paths that are found from any folder."""
        if self.recipe.data in self.sets:
            return self.recipe
        labels = self.recipe.labels and data.absolute(self.recipe.labels)
        return self.recipe.replace(data=data.absolute(self.recipe.data), labels=labels)

    def load(self, device: torch.device) -> Any:
        """The recipe's data, such as a `fastgan.data.Samples`.

        A file that cannot be used is named in its `skipped`; ValueError where nothing can be used.
        """
        raise NotImplementedError

    def fit(self, samples: Any) -> Recipe:
        """The recipe with what the data decide, such as the number of classes. ValueError where they do not agree."""
        shape = tuple(samples.values.shape[1:])
        if shape != self.shape:
            raise ValueError(f"training: {self.noun} must be {list(self.shape)} as the recipe says, got {list(shape)}")
        return self.recipe

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        raise NotImplementedError

    @property
    def made(self) -> tuple[int, ...]:
        """The shape of what the generator gives for one input: that of a sample."""
        return self.shape

    def hold_out(self, samples: Any, count: int) -> tuple[Any, Any | None]:
        """(the samples to train on, `count` of them kept back), evenly over the set; (all, None) for 0."""
        if not count:
            return samples, None
        if count >= len(samples) or samples.mapped:
            least = "0 for samples that stay in a file" if samples.mapped else f"below the {len(samples)} {self.noun}"
            raise ValueError(f"training: held_out must be {least}, got {count}")
        kept = torch.zeros(len(samples), dtype=torch.bool)
        kept[(torch.arange(count) * len(samples)) // count] = True
        return samples.select((~kept).nonzero().flatten()), samples.select(kept.nonzero().flatten())

    def batches(self, samples: Any, part: tuple[int, int] = (0, 1)) -> Stream:
        """An endless stream of batches; part: (k, n) gives the k-th of n equal parts of each."""
        recipe = self.recipe
        rng = torch.Generator().manual_seed(recipe.seed)
        options: Any = dict(generator=rng, flip=recipe.flip, channels_last=len(self.shape) == 3, part=part)
        return data.Batches(samples, recipe.batch_size, **options)

    # ---- training -------------------------------------------------------------------------------------------------

    def step(self, generator: nn.Module, discriminator: nn.Module) -> dict[str, Any]:
        """Arguments of `fastgan.GANStep` that the recipe's own fields do not give: the latents, losses of its own."""
        return {"latent": self.recipe.latent}

    def inputs(self, drawn: Sequence[Any]) -> tuple[Any, Any, Any]:
        """(real, labels, z) for `fastgan.GANStep`, of d_steps batches; z None: the step draws it."""
        real, labels = zip(*drawn, strict=True)
        return real, labels if self.recipe.conditional else None, None

    def probe(self, device: torch.device | str) -> Any:
        """A batch as `batches` gives it, of random numbers in [-1, 1]."""
        recipe = self.recipe
        shape = recipe.batch_size, *self.shape
        # the meta device has shapes and no memory, and draws nothing
        x = torch.empty(shape, device=device) if str(device) == "meta" else (torch.rand(shape) * 2 - 1).to(device)
        x = x.to(memory_format=torch.channels_last) if len(self.shape) == 3 else x
        labels = torch.arange(recipe.batch_size, device=device) % recipe.classes if recipe.conditional else None
        return x, labels

    # ---- looking --------------------------------------------------------------------------------------------------

    def given(self, samples: Any) -> Given:
        """What the sample grids are drawn from; samples: the training set."""
        labels, columns, count = None, None, self.recipe.sample_count
        if self.recipe.conditional:
            labels, columns = sampling.class_rows(count, self.recipe.classes)
            count = len(labels)
        return Given(sampling.latents(count, self.recipe.latent, seed=self.recipe.seed), labels, columns)

    def draw(self, generator: nn.Module, z: Tensor, labels: Tensor | None) -> Tensor:
        """Samples [N, ...] in eval mode, fp32 on the CPU."""
        return sampling.draw(generator, z, labels)

    def pictures(self, made: Tensor) -> Tensor:
        """Samples as pictures [N, 1 or 3, H, W] in [-1, 1] for grids and TensorBoard: a sound's spectrogram, say."""
        raise NotImplementedError

    def write(self, made: Tensor, path: Path, columns: int | None) -> None:
        """A grid of samples to `path`, a .png; other files of theirs go beside it, under its name."""
        data.save_grid(self.pictures(made), path, columns=columns)

    def show(self, path: Path, caption: str, kind: str = "") -> str:
        """HTML of what `write` wrote, for the report."""
        return picture(path, caption, kind)

    def judge(self, samples: Any) -> Judge | None:
        """What scores the generator on a schedule, where these samples have such a measure."""
        return None

    def health(self, samples: Any, held: Any | None) -> Looks | None:
        """What looks for a collapse, where these samples have such a look."""
        return None

    def compare(self, directory: RunDirectory, samples: Any, made: Tensor, columns: int | None) -> str:
        """At the end of a run: training samples to pictures/real.png, and a sentence for the report or ""."""
        return ""

    def require_latents(self, command: str) -> None:
        """ValueError, which begins with `command`, where the generator takes no latents [N, recipe.latent]."""

    # ---- fastgan sample -------------------------------------------------------------------------------------------

    def check_out(self, out: str | None) -> None:
        """ValueError unless samples can be saved there; None is the terminal, for samples that can be printed."""
        if out is None or Path(out).suffix.lower() != ".png":
            raise ValueError(f"sample: --out must end in .png, got {out}")
        target_of(out)

    def sample(
        self,
        generator: nn.Module,
        config: Mapping[str, Any],
        count: int,
        *,
        seed: int,
        label: str | None = None,
        truncation: float | None = None,
    ) -> tuple[Tensor, int | None]:
        """(about `count` new samples, how many a row or None). config: the run's.

        truncation draws styles towards their mean where the generator has them, else it cuts the latents.
        """
        labels, rows = None, None
        if label is not None:
            data.require(8 * count, "cpu", f"labels: {count:,} numbers")
            labels = torch.full((count,), sampling.class_number(config, label))
        elif self.recipe.conditional:
            labels, rows = sampling.class_rows(count, self.recipe.classes)
        count = count if labels is None else len(labels)
        if truncation is not None and hasattr(generator, "truncated"):
            generator, truncation = generator.truncated(truncation), None  # type: ignore[operator]
        z = sampling.latents(count, self.recipe.latent, seed=seed, truncation=truncation)
        return self.draw(generator, z, labels), rows

    def save(self, made: Tensor, out: str | None, columns: int | None) -> None:
        """Write samples where the user wants them."""
        self.write(made, Path(out or ""), columns)
