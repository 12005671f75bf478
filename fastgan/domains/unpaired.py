"""Pictures from pictures without pairs: two sides, a generator each way, and a way back that returns to the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from fastgan import data
from fastgan.data.pairs import UnpairedSet, load_unpaired
from fastgan.metrics import features, kernel_distance, load_backbone
from fastgan.training import sampling
from fastgan.training.health import Health
from fastgan.training.history import History
from fastgan.training.outputs import Outputs
from fastgan.training.recipes import Recipe
from fastgan.training.rundir import RunDirectory

from .domain import Given, Stream
from .pairs import COLUMNS, Translating, in_rows, normalised, sheet

__all__ = ["Unpaired"]


class Unpaired(Translating):
    """Two sides of pictures, a and b. A batch is one tensor: the planes of a, then those of b.

    domain_options: `made` as in `fastgan.data.pairs.load_unpaired`; `cycle`: the weight of the way there and back;
    `identity`: of the loss that leaves pictures of the wanted side as they are, as a share of `cycle`; `history`: how
    many earlier translations the critics are shown again, 0 for none.
    """

    name = "unpaired"
    noun = "pictures a side"
    metrics = ("kcd", "kcd_ab", "kcd_ba", "cycle")
    charts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "Kernel distance": {
            "kcd_ab": "a to b beside b, features of small; lower is nearer",
            "kcd_ba": "b to a beside a",
        },
        "There and back": {"cycle": "mean absolute difference, of [-1, 1]"},
    }
    options: ClassVar[Mapping[str, Any]] = {"made": "auto", "cycle": 10.0, "identity": 0.5, "history": 50}

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self._shown: Tensor | None = None  # both sides of the grid, as planes

    # ---- data -----------------------------------------------------------------------------------------------------

    @property
    def made(self) -> tuple[int, ...]:
        """Both translations, one behind the other."""
        channels, height, width = self.shape
        return 2 * channels, height, width

    def load(self, device: torch.device) -> UnpairedSet:
        """See `load_unpaired`."""
        sizes: Any = dict(image_size=self.recipe.image_size, channels=self.recipe.channels)
        return load_unpaired(self.recipe.data, **sizes, made=self.option["made"], device=device)

    def fit(self, samples: Any) -> Recipe:
        """The recipe; ValueError where the sides have other sizes."""
        shapes = {tuple(side.values.shape[1:]) for side in samples.parts} if isinstance(samples, UnpairedSet) else set()
        if shapes != {self.shape}:
            raise ValueError(
                f"training: pictures must be an UnpairedSet of {list(self.shape)} as the recipe says, got "
                f"{type(samples).__name__} of {', '.join(str(list(s)) for s in shapes) or 'other samples'}"
            )
        return self.recipe

    def hold_out(self, samples: UnpairedSet, count: int) -> tuple[UnpairedSet, None]:
        """Nothing is held out: there is no truth to compare with."""
        if count:
            raise ValueError(f"training: held_out must be 0 without pairs, got {count}")
        return samples, None

    def batches(self, samples: UnpairedSet, part: tuple[int, int] = (0, 1)) -> Stream:
        """Batches of both sides, each in an order of its own."""
        recipe = self.recipe
        options: Any = dict(flip=recipe.flip, channels_last=True, part=part)
        seeds = (recipe.seed, recipe.seed + 3)  # the run itself takes seed, + 1 and + 2
        streams = [
            data.Batches(side, recipe.batch_size, generator=torch.Generator().manual_seed(seed), **options)
            for side, seed in zip(samples.parts, seeds, strict=True)
        ]
        return TwoStreams(*streams)

    # ---- training -------------------------------------------------------------------------------------------------

    def step(self, generator: nn.Module, discriminator: nn.Module) -> dict[str, Any]:
        """The cycle and identity losses of Zhu et al. 2017 (section 3.2 and 5.2), and their history of fakes."""
        # the authors' LSGAN for G is the plain square, gan_loss is half of it: so the weight here is halved
        weight = float(self.option["cycle"]) * (0.5 if self.recipe.loss == "lsgan" else 1.0)
        cycle = CycleLoss(generator, weight, float(self.option["identity"]))
        size = int(self.option["history"])
        history = Histories(size) if size else None
        return {"latent": lambda n, device, rng: None, "extra_g_loss": cycle, "history": history}

    def inputs(self, drawn: Sequence[tuple[Tensor, Tensor]]) -> tuple[Any, Any, Any]:
        """(planes b then a, as the translations come; no labels; planes a then b, what the generators are given)."""
        layout: Any = dict(memory_format=torch.channels_last)
        real = [torch.cat([b, a], 1).contiguous(**layout) for a, b in drawn]
        return real, None, [torch.cat([a, b], 1).contiguous(**layout) for a, b in drawn]

    def probe(self, device: torch.device | str) -> Any:
        """A batch of random pictures of each side."""
        return super().probe(device)[0], super().probe(device)[0]

    # ---- looking --------------------------------------------------------------------------------------------------

    def given(self, samples: UnpairedSet) -> Given:
        """As many pictures of each side, evenly over them; the planes of a, then those of b."""
        count = min(self.recipe.sample_count, *map(len, samples.parts))
        sides = [normalised(s.select(in_rows(len(s), count)).images).cpu() for s in samples.parts]
        self._shown = torch.cat(sides, 1)
        return Given(self._shown, None, min(COLUMNS, len(self._shown)))

    def pictures(self, made: Tensor) -> Tensor:
        """Rows of a, of a to b, of b, of b to a."""
        b, a = made.chunk(2, 1)
        if self._shown is None or len(self._shown) != len(made):
            return torch.cat([b, a])
        of_a, of_b = self._shown.chunk(2, 1)
        return sheet([of_a, b, of_b, a])

    def judge(self, samples: UnpairedSet) -> UnpairedJudge:
        """Kernel distances of both ways, and how far the way back ends from where it began."""
        return UnpairedJudge(samples)

    def health(self, samples: UnpairedSet, held: Any | None) -> OneWayHealth:
        """Variety and coverage of a to b beside b."""
        return OneWayHealth(Health(samples.b, None, labelled=False))

    def compare(self, directory: RunDirectory, samples: UnpairedSet, made: Tensor, columns: int | None) -> str:
        """pictures/real.png: rows of a and of b."""
        count = min(2 * COLUMNS, *map(len, samples.parts))
        rows = [normalised(s.select(in_rows(len(s), count)).images).cpu() for s in samples.parts]
        data.save_grid(sheet(rows), directory.pictures / "real.png", columns=min(COLUMNS, len(rows[0])))
        return ""

    # ---- fastgan translate ----------------------------------------------------------------------------------------

    def translator(self, generator: Any, direction: str | None) -> tuple[nn.Module, int]:
        """The generator of that way; a to b unless told otherwise."""
        return generator.ba if direction == "ba" else generator.ab, self.recipe.channels


class TwoStreams(Iterator[tuple[Tensor, Tensor]]):
    """Batches of both sides."""

    def __init__(self, a: data.Batches, b: data.Batches):
        self._a, self._b = a, b

    def __next__(self) -> tuple[Tensor, Tensor]:
        return next(self._a)[0], next(self._b)[0]

    def state_dict(self) -> dict[str, Any]:
        """Both streams' states."""
        return {"a": self._a.state_dict(), "b": self._b.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, changed: bool = False) -> None:
        """The inverse of `state_dict`."""
        self._a.load_state_dict(state["a"], changed=changed)
        self._b.load_state_dict(state["b"], changed=changed)


class CycleLoss:
    """weight (|ba(ab(a)) - a| + |ab(ba(b)) - b| + identity (|ab(b) - b| + |ba(a) - a|)), each a mean."""

    reads_d_real = False
    calls = ("ab", "ba")  # parts of the generator, which plain PyTorch's row of a benchmark compiles for themselves

    def __init__(self, generator: Any, weight: float, identity: float):
        self.generator, self.weight, self.identity = generator, weight, identity

    def __call__(self, outputs: Outputs) -> Tensor:
        g, both = self.generator, outputs.z
        a, b = both.chunk(2, 1)
        made_b, made_a = outputs.fake.to(both.dtype).chunk(2, 1)
        loss = distance(g.ba(made_b), a) + distance(g.ab(made_a), b)
        if self.identity:
            loss = loss + self.identity * (distance(g.ab(b), b) + distance(g.ba(a), a))
        return self.weight * loss


def distance(made: Tensor, wanted: Tensor) -> Tensor:
    """L1, in the dtype of `wanted`."""
    return l1_loss(made.to(wanted.dtype), wanted)


class Histories:
    """A history for each side."""

    def __init__(self, size: int):
        self._sides = {"b": History(size), "a": History(size)}

    def __call__(self, fake: Tensor) -> Tensor:
        sides = zip(self._sides.values(), fake.chunk(2, 1), strict=True)
        made = torch.cat([history(planes) for history, planes in sides], 1)
        return made.contiguous(memory_format=torch.channels_last)

    def state_dict(self) -> dict[str, Any]:
        """Of both sides."""
        return {name: history.state_dict() for name, history in self._sides.items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`."""
        for name, history in self._sides.items():
            history.load_state_dict(state[name], device)


class OneWayHealth:
    """`Health` of one way."""

    def __init__(self, health: Health):
        self._health = health

    def look(self, generator: Any, discriminator: nn.Module, z: Tensor, labels: Tensor | None) -> dict[str, float]:
        """See `Health.look`."""
        return self._health.look(generator.ab, discriminator, z.chunk(2, 1)[0], None)


class UnpairedJudge:
    """Scores of both ways.

    kcd_ab  kernel distance between the features of a to b and of b, on the backbone "small"; kcd_ba likewise
    kcd     their mean
    cycle   mean absolute difference between pictures and where the way there and back ends, of [-1, 1]
    """

    metric, words, batch = "kcd", "kernel distance", 16

    def __init__(self, samples: UnpairedSet):
        self._samples, self._backbone, self.available = samples, load_backbone(), min(map(len, samples.parts))
        self.identity = f"both ways, features of {self._backbone.identity}"

    def make(self, generator: Any, count: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """For each way: (pictures, their translations, the way back)."""
        made = {}
        for side, there, back in (("a", generator.ab, generator.ba), ("b", generator.ba, generator.ab)):
            of: data.ImageSet = getattr(self._samples, side)
            at = torch.linspace(0, len(of) - 1, count).round().long()
            pictures = normalised(of.select(at).images).cpu()
            translated = sampling.draw(there, pictures, batch=self.batch)
            made[side] = pictures, translated, sampling.draw(back, translated, batch=self.batch)
        return made

    def score(self, made: dict[str, tuple[Tensor, Tensor, Tensor]], count: int) -> dict[str, float]:
        """The scores; empty below two pictures."""
        if count < 2 or not all(t.isfinite().all() for of in made.values() for t in of):
            return {}
        backbone = self._backbone
        real = {side: features(data.to_uint8(of[0]), backbone) for side, of in made.items()}
        ab = kernel_distance(real["b"], features(made["a"][1], backbone))
        ba = kernel_distance(real["a"], features(made["b"][1], backbone))
        cycle = sum(float(l1_loss(back, start)) for start, _, back in made.values()) / 2
        return {"kcd": (ab + ba) / 2, "kcd_ab": ab, "kcd_ba": ba, "cycle": cycle}
