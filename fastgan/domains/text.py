"""Lines of text, a character at a time: one-hot from files, softmaxes from the generator."""

from __future__ import annotations

import html
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastgan._writing import target_of, write
from fastgan.data.lines import DEMONSTRATION, LineSet, load_lines, texts
from fastgan.metrics import ngram_divergence
from fastgan.models.chargan import ALPHABET
from fastgan.training.figures import figure
from fastgan.training.health import Health
from fastgan.training.recipes import Recipe
from fastgan.training.rundir import RunDirectory
from fastgan.training.sampling import draw, latents

from .domain import Domain
from .sound import some_of

__all__ = ["NgramJudge", "Text"]

NGRAMS = (4, 3, 2, 1)
CELL = 12, 7  # pixels of a character in pictures
COLUMNS = 2


class Text(Domain):
    """Lines of at most `length` characters, as [symbols, length]: at each place one of the alphabet's characters."""

    name = "text"
    noun = "lines"
    # Of the demonstration's one-hot lines the mean deviation is 0.087; one softmax for all has 0.
    flat = 0.005
    metrics = tuple(f"jsd{n}" for n in NGRAMS)
    charts: ClassVar = {
        "N-grams": {f"jsd{n}": f"divergence of {n}-grams from those of the lines, bits" for n in NGRAMS}
    }
    options: ClassVar = {"length": 24, "alphabet": ""}
    least: ClassVar = {"length": 1}
    sets: ClassVar = {DEMONSTRATION: "4,608 short sentences, every one that a small grammar has"}

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        for field in ("flip", "augment"):
            if getattr(recipe, field):
                raise ValueError(f"recipe: {field} must be off for text, got {getattr(recipe, field)!r}")

    def load(self, device: torch.device) -> LineSet:
        """What `fastgan.data.lines.load_lines` reads."""
        return load_lines(self.recipe.data, **self.option, device=device)

    def fit(self, samples: LineSet) -> Recipe:
        """The recipe with the alphabet of the lines."""
        length, alphabet = self.option["length"], self.option["alphabet"]
        if samples.values.shape[1] != length or alphabet not in ("", samples.alphabet):
            got = f"{samples.values.shape[1]} of {samples.alphabet!r}"
            raise ValueError(f"training: lines must be of {length} characters of {alphabet!r}, got {got}")
        return self.recipe.replace(domain_options={**self.option, "alphabet": samples.alphabet})

    @property
    def alphabet(self) -> str:
        """That of the run; before it has data, the model's."""
        return self.option["alphabet"] or ALPHABET

    @property
    def shape(self) -> tuple[int, ...]:
        """[symbols, length]"""
        return len(self.alphabet), self.option["length"]

    # ---- looking --------------------------------------------------------------------------------------------------

    def lines(self, made: Tensor) -> list[str]:
        """Samples [N, symbols, length] as texts: at each place the likeliest character."""
        return texts(made.argmax(1), self.alphabet)

    def pictures(self, made: Tensor) -> Tensor:
        """Samples as pictures of their lines, [N, 1, height, width]."""
        height, width = CELL
        pixels = np.zeros((len(made), height, width * self.option["length"]), np.uint8)
        for row, line in zip(pixels, self.lines(made), strict=True):
            for at, character in enumerate(line):
                row[:, at * width : (at + 1) * width] = _glyph(character)
        return torch.from_numpy(pixels)[:, None].float() / 127.5 - 1

    def write(self, made: Tensor, path: Path, columns: int | None) -> None:
        """A picture of the lines to `path`, and the lines beside it as .txt."""
        super().write(made, path, columns or COLUMNS)
        write(path.with_suffix(".txt"), "\n".join(self.lines(made)) + "\n")

    def show(self, path: Path, caption: str, kind: str = "") -> str:
        """The lines, as text."""
        beside = path.with_suffix(".txt")
        if not beside.exists():
            return super().show(path, caption, kind)
        return figure(f"<pre>{html.escape(beside.read_text(encoding='utf-8'))}</pre>", caption, kind)

    def judge(self, samples: LineSet) -> NgramJudge:
        """Divergences of n-grams of characters."""
        return NgramJudge(self, samples)

    def health(self, samples: LineSet, held: LineSet | None) -> Health:
        """The share of lines that are different beside that of the training lines, and how many of those have one near.

        Two lines are as far from each other as the number of places where their characters differ.
        """
        return Health(samples, held, look=_places, variety=_different)

    def compare(self, directory: RunDirectory, samples: LineSet, made: Tensor, columns: int | None) -> str:
        """pictures/real.png with its lines, and how many generated lines are training lines."""
        self.write(some_of(samples, len(made)), directory.pictures / "real.png", columns)
        lines, known = self.lines(made), set(samples.lines())
        learnt = sum(line in known for line in lines)
        return f"{learnt} of {len(lines)} generated lines are training lines, {len(set(lines))} are different"

    # ---- fastgan sample -------------------------------------------------------------------------------------------

    def check_out(self, out: str | None) -> None:
        """A .txt or a .png; None prints the lines."""
        if out is None:
            return
        if Path(out).suffix.lower() not in (".txt", ".png"):
            raise ValueError(f"sample: --out must end in .txt or .png, or be left out to print lines, got {out}")
        target_of(out)

    def save(self, made: Tensor, out: str | None, columns: int | None) -> None:
        """Lines to a .txt or a picture of them, or to the terminal."""
        if out is None:
            print("\n".join(self.lines(made)))
        elif Path(out).suffix.lower() == ".txt":
            write(out, "\n".join(self.lines(made)) + "\n")
        else:
            super().write(made, Path(out), columns or COLUMNS)


class NgramJudge:
    """The Jensen-Shannon divergence of n-grams between generated lines and as many training lines, n from 4 to 1."""

    metric, words, identity = "jsd4", "divergence of 4-grams", "n-grams of characters"

    def __init__(self, domain: Text, samples: LineSet):
        self._domain, self._samples, self.batch = domain, samples, domain.recipe.sample_count
        self._real: list[str] = []
        self.available = len(samples)

    def make(self, generator: nn.Module, count: int) -> list[str]:
        """`count` lines; none where a sample is not finite."""
        recipe = self._domain.recipe
        made = draw(generator, latents(count, recipe.latent, seed=recipe.seed + 2), batch=self.batch)
        return self._domain.lines(made) if made.isfinite().all() else []

    def score(self, made: list[str], count: int) -> dict[str, float]:
        """The divergences of `make`'s lines from `count` training lines, evenly over the set."""
        if not made:
            return {}
        if not self._real:
            self._real = self._samples.lines(torch.linspace(0, len(self._samples) - 1, count).round().long())
        # lines too short for an n-gram have none in common with others
        longest = min(max(map(len, lines)) for lines in (self._real, made)) + 1
        return {f"jsd{n}": ngram_divergence(self._real, made, n) if n <= longest else 1.0 for n in NGRAMS}


def _places(made: Tensor) -> Tensor:
    """Floats [N, symbols length] of lines [N, symbols, length]: 1 for the character at each place up to the end."""
    numbers = made.argmax(1)
    numbers[(numbers == 0).cumsum(1) > 0] = 0
    return nn.functional.one_hot(numbers, made.shape[1]).flatten(1).float()


def _different(features: Tensor) -> float:
    """The share of rows that are different, from 0 where all are one to 1."""
    return (len(features.unique(dim=0)) - 1) / (len(features) - 1)


@cache
def _glyph(character: str) -> np.ndarray:
    """uint8 [height, width] of a character, white on black."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = CELL
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((0, 0), character, fill=255, font=ImageFont.load_default())
    return np.asarray(image)
