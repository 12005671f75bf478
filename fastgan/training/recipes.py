"""Recipes: every field of a run in one frozen object, and the named ones that follow a published text.

recipe = fastgan.recipes()["dcgan-28"].replace(batch_size=64)
recipe = recipe.with_settings(["g_lr=2e-4", "model_options.g_width=32"])      # what `--set` does
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastgan import models, penalties
from fastgan.functional.losses import KINDS as LOSSES
from fastgan.functional.losses import RELATIVE

from .augment import policy_of

__all__ = ["Recipe", "recipes"]

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SCHEDULES = ("constant", "linear", "cosine")
SMOOTHED = ("bce", "minimax", "lsgan")  # losses that have a target to smooth
STYLED = ("stylegan2-small",)  # models whose generator has a path_length_penalty
CHOICES = {"loss": LOSSES, "penalty": (None, *penalties.KINDS), "precision": PRECISIONS, "schedule": SCHEDULES}
AT_LEAST_1 = (
    *("image_size", "channels", "latent", "batch_size", "steps", "penalty_every", "path_length_every", "d_steps"),
    *("sample_count", "log_every", "keep_checkpoints"),
)
AT_LEAST_0 = (
    *("seed", "classes", "warm_up", "sample_every", "checkpoint_every", "eval_every", "watch_every", "held_out"),
    *("keep_samples", "keep_records"),
)
OWN = ("image_size", "channels", "latent", "classes")  # a model's options that are fields of a recipe
MAX_SEED = 1 << 63  # torch takes one more bit, and a run adds small numbers to its seed


@dataclass(frozen=True)
class Recipe:
    """One training run, except where it runs (device, backend) and where it writes.

    Raises ValueError or TypeError, naming the field, when a value cannot be meant.
    """

    name: str
    #: a name of `fastgan.models.presets()`, and options that its `build` takes besides the three fields below
    model: str
    model_options: dict[str, Any] = field(default_factory=dict)
    #: what the samples are: a name of `fastgan.domains.domains()`, and what else that domain wants to know
    domain: str = "images"
    domain_options: dict[str, Any] = field(default_factory=dict)
    #: what `fastgan.data.load` takes: a data set's name, a folder or an archive
    data: str = "fashion-mnist"
    #: a CSV of FILE,LABEL lines for a folder of images, in place of the folders' names
    labels: str | None = None
    #: both networks take labels
    conditional: bool = False
    #: of a conditional run; 0: as many as the images have
    classes: int = 0
    image_size: int = 28
    channels: int = 1
    latent: int = 100
    batch_size: int = 64
    #: generator updates
    steps: int = 10_000
    loss: str = "bce"
    g_lr: float = 2e-4
    d_lr: float = 2e-4
    #: Adam's betas, for both optimisers
    betas: tuple[float, float] = (0.5, 0.999)
    adam_eps: float = 1e-8
    #: of the networks; master weights and optimiser state stay fp32. auto: bf16 where the machine is faster in it
    precision: str = "fp32"
    penalty: str | None = None
    #: None: the customary one, 10 (1 for r1r2)
    penalty_weight: float | None = None
    #: steps between penalties
    penalty_every: int = 1
    #: the deviation of the noise of r1-approximate and r2-approximate (Lin et al., arXiv 2501.08316)
    penalty_sigma: float = 0.01
    #: weight of the generator's path-length penalty (StyleGAN2 takes 2); None: no penalty
    path_length: float | None = None
    #: steps between path-length penalties
    path_length_every: int = 4
    #: discriminator updates for one of the generator
    d_steps: int = 1
    #: the discriminator learns from real and generated images in turn: fewer activations at a time, the same numbers;
    #: None: with large batches on a CPU, where that is faster
    low_memory: bool | None = None
    #: decay of the averaged generator that samples are drawn from; None: no average
    ema: float | None = None
    #: in images, in place of `ema`: the average forgets half in so many (or in 5 % of those seen, while that is less)
    ema_half_life: float | None = None
    #: of both learning rates: constant, linear or cosine, towards 0 at the last step, after `warm_up` steps of rise
    schedule: str = "constant"
    warm_up: int = 0
    #: largest norm of each network's gradient; None: any
    grad_clip: float | None = None
    #: the discriminator's target of real images is 1 less this (bce, minimax, lsgan)
    label_smoothing: float = 0.0
    #: its target of generated images (bce, minimax, lsgan): smoothing on both sides (Salimans et al. 2016,
    #: arXiv:1606.03498)
    fake_smoothing: float = 0.0
    #: the generator comes to learn from this share of a batch alone, its images that D takes for the realest; the share
    #: falls to it by a hundredth an epoch (Sinha et al. 2020, arXiv:2002.06224)
    top_k: float = 1.0
    #: what the discriminator sees of all images: some of colour,translation,cutout (Zhao et al. 2020, arXiv:2006.10738)
    #: or ada, which follows how sure the discriminator is of real images (Karras et al. 2020, arXiv:2006.06676)
    augment: str | None = None
    #: of ada: the mean sign of real logits that is held, and the images in which the probability may rise from 0 to 1
    ada_target: float = 0.6
    ada_images: float = 500_000.0
    #: deviation of noise on all that the discriminator sees, falling to 0 at half of the steps
    instance_noise: float = 0.0
    #: mirror images at random
    flip: bool = False
    #: on several ranks, batch norm and all else that looks over a batch look over the batch of all ranks
    sync_statistics: bool = False
    seed: int = 0
    #: images in a sample grid
    sample_count: int = 64
    #: in steps; 0: only at the end
    sample_every: int = 1_000
    checkpoint_every: int = 1_000
    #: in steps; reading metrics waits for the device, so not every step
    log_every: int = 50
    #: steps between evaluations (kernel and Frechet distance on the backbone "small"); 0: none
    eval_every: int = 0
    #: steps between looks for a collapse (variety of pictures, gradients, overfitting); 0: none
    watch_every: int = 100
    #: images kept from training, to see the discriminator overfit
    held_out: int = 0
    #: checkpoints kept in the run directory, newest first
    keep_checkpoints: int = 2
    #: sample grids and lines of the log kept there, evenly over the run; 0: all
    keep_samples: int = 1_000
    keep_records: int = 20_000
    #: the text that this recipe follows, and where it departs from it
    source: str = ""

    def __post_init__(self) -> None:
        for name, kind in _field_types().items():
            object.__setattr__(self, name, _coerce(name, getattr(self, name), kind))
        known = models.options(self.model)
        for key in self.model_options:
            if key not in known or key in OWN:
                free = [k for k in known if k not in OWN]
                raise ValueError(
                    f"recipe: model_options of {self.model} are {', '.join(free)}, got {key!r}"
                    + (f"; set {key} itself" if key in known else "")
                )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                wanted = ", ".join(str(c) for c in choices)
                raise ValueError(f"recipe: {name} must be one of {wanted}, got {getattr(self, name)!r}")
        for least, names in ((1, AT_LEAST_1), (0, AT_LEAST_0)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"recipe: {name} must be at least {least}, got {getattr(self, name)}")
                if getattr(self, name) >= MAX_SEED:
                    raise ValueError(f"recipe: {name} must be below 2^63, got {getattr(self, name)}")
        self._check_classes(known)
        if self.warm_up and self.warm_up >= self.steps:
            raise ValueError(f"recipe: warm_up must be below steps, which are {self.steps}, got {self.warm_up}")
        for name in ("name", "model", "domain", "data"):
            text = getattr(self, name)
            if not text.strip() or "\0" in text:
                raise ValueError(f"recipe: {name} must be neither empty nor hold a NUL character, got {text!r}")
        self._check_numbers()

    def _check_classes(self, known: Mapping[str, Any]) -> None:
        if self.conditional and "classes" not in known:
            raise ValueError(f"recipe: conditional must be false with {self.model}, which takes no labels")
        if self.classes == 1 or (self.classes and not self.conditional):
            wanted = "at least 2" if self.conditional else "0 unless the run is conditional"
            raise ValueError(f"recipe: classes must be {wanted}, got {self.classes}")

    def _check_numbers(self) -> None:
        for name in ("g_lr", "d_lr", "adam_eps", "penalty_weight", "path_length", "instance_noise"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"recipe: {name} must be finite and at least 0, got {value}")
        for name in ("ema_half_life", "grad_clip", "ada_images"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"recipe: {name} must be none or finite and above 0, got {value}")
        if not 0 < self.penalty_sigma < float("inf"):
            raise ValueError(f"recipe: penalty_sigma must be finite and above 0, got {self.penalty_sigma}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"recipe: betas must be in [0, 1), got {self.betas}")
        if self.path_length and self.model not in STYLED:
            raise ValueError(f"recipe: path_length goes with {', '.join(STYLED)}, got {self.model}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"recipe: ema must be none or in [0, 1), got {self.ema}")
        if self.ema is not None and self.ema_half_life is not None:
            raise ValueError("recipe: ema and ema_half_life are two ways to say one thing, set the other to none")
        for name in ("label_smoothing", "fake_smoothing"):
            value = getattr(self, name)
            if not 0 <= value < 0.5:
                raise ValueError(f"recipe: {name} must be in [0, 0.5), got {value}")
            if value and self.loss not in SMOOTHED:
                raise ValueError(f"recipe: {name} goes with {', '.join(SMOOTHED)}, got {self.loss}")
        if not 0 < self.top_k <= 1 or (self.top_k < 1 and self.loss in RELATIVE):
            raise ValueError(f"recipe: top_k must be in (0, 1], and 1 with {', '.join(RELATIVE)}, got {self.top_k}")
        if self.low_memory and self.loss in RELATIVE:
            raise ValueError(f"recipe: low_memory goes with losses other than {', '.join(RELATIVE)}, got {self.loss}")
        if self.augment is not None:
            policy_of(self.augment)
        if not -1 < self.ada_target < 1:
            raise ValueError(f"recipe: ada_target must be in (-1, 1), got {self.ada_target}")

    @property
    def averaged(self) -> bool:
        """Whether samples come from an averaged generator."""
        return self.ema is not None or self.ema_half_life is not None

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed. Raises ValueError for an unknown field."""
        unknown = sorted(set(changes) - set(_field_types()))
        if unknown:
            raise ValueError(f"recipe: there is no field {unknown[0]!r}, the fields are {', '.join(_field_types())}")
        return dataclasses.replace(self, **changes)

    def with_settings(self, settings: Iterable[str]) -> Recipe:
        """A copy with ``KEY=VALUE`` texts applied; ``model_options.KEY=VALUE`` reaches into the model, and
        ``domain_options.KEY=VALUE`` into what the samples are."""
        changes: dict[str, Any] = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            key = key.strip()
            if not equals or not key:
                raise ValueError(f"recipe: a setting must read KEY=VALUE, got {setting!r}")
            table, dot, option = key.partition(".")
            if dot and table in ("model_options", "domain_options"):
                changes.setdefault(table, dict(getattr(self, table)))[option] = _literal(text.strip())
            elif key in _field_types():
                changes[key] = _parse(key, text.strip(), _field_types()[key])
            else:
                self.replace(**{key: None})  # raises, with the list of fields
        return self.replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as config.json holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`. Fields left out come from the named recipe, if `name` is one."""
        if not isinstance(values, Mapping):
            raise TypeError(f"recipe: it must be a table of fields, got {values!r}")
        name = values.get("name")
        if name in _RECIPES:
            return _RECIPES[str(name)].replace(**values)
        missing = [key for key in ("name", "model") if key not in values]
        if missing:
            raise ValueError(f"recipe: {missing[0]} must be given, the named recipes are {', '.join(_RECIPES)}")
        return cls(name=values["name"], model=values["model"]).replace(**values)


def _field_types() -> dict[str, Any]:
    global _TYPES
    if _TYPES is None:
        _TYPES = typing.get_type_hints(Recipe)
    return _TYPES


_TYPES: dict[str, Any] | None = None


def _describe(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_describe(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{len(typing.get_args(kind))} numbers"
    return {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "none",
    }.get(kind, "a table of options")


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`; whole numbers pass for numbers and lists for tuples, as JSON needs."""
    if isinstance(kind, types.UnionType):
        if value is None and type(None) in typing.get_args(kind):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e4 steps
    if typing.get_origin(kind) is tuple and isinstance(value, (tuple, list)):
        kinds = typing.get_args(kind)
        if len(value) == len(kinds):
            return tuple(_coerce(name, v, k) for v, k in zip(value, kinds, strict=True))
    elif typing.get_origin(kind) is dict and isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise TypeError(f"recipe: {name} must be {_describe(_field_types()[name])}, got {value!r}")


def _literal(text: str) -> Any:
    """A Python literal where the text is one (true, false and none in any case), else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parse(name: str, text: str, kind: Any) -> Any:
    """The value that `text` stands for in field `name`."""
    if kind is str:
        return text
    if isinstance(kind, types.UnionType) and str in typing.get_args(kind):
        return None if text.lower() == "none" else text
    return _coerce(name, _literal(text), kind)


_EMOJI_64: dict[str, Any] = {"data": "emoji-64", "image_size": 64, "channels": 3}
_EMOJI_32: dict[str, Any] = {**_EMOJI_64, "image_size": 32}
# Gulrajani et al. 2017, algorithm 1.
_WGAN_GP: dict[str, Any] = dict(loss="wasserstein", penalty="wgan-gp", penalty_weight=10.0, d_steps=5)
_WGAN_GP |= {"g_lr": 1e-4, "d_lr": 1e-4}
_RECIPES = {
    r.name: r
    for r in (
        Recipe(
            name="fastgan",
            model="fastgan",
            **_EMOJI_64,
            batch_size=32,
            steps=20_000,
            penalty="r1",
            penalty_weight=1.0,
            betas=(0.0, 0.99),
            g_lr=4e-4,
            d_lr=4e-4,
            ema_half_life=10_000.0,
            eval_every=500,
            source="the default on a folder, chosen by experiment (docs/losses-and-recipes.md): R1 as Mescheder et al. "
            "2018 (arXiv:1801.04406), averaged as Karras et al. 2020 (arXiv:2006.06676); networks of dcgan-64 with "
            "widths by image size",
        ),
        Recipe(
            name="mlp-28",
            model="mlp-28",
            data="fashion-mnist",
            batch_size=64,
            steps=20_000,
            source="PyTorch-GAN collection, implementations/gan: Adam 2e-4 (0.5, 0.999), batch 64; it trains "
            "187,600 steps (200 epochs of MNIST) with a sigmoid output and BCE, the same loss as from logits",
        ),
        Recipe(
            name="dcgan-28",
            model="dcgan-28",
            data="fashion-mnist",
            batch_size=256,
            steps=11_750,
            g_lr=1e-4,
            d_lr=1e-4,
            betas=(0.9, 0.999),
            adam_eps=1e-7,
            source="Keras tutorial, tensorflow.org/tutorials/generative/dcgan: Adam 1e-4 with Keras' default "
            "betas and eps, batch 256, 50 epochs of 60,000 images (235 steps each)",
        ),
        Recipe(
            name="dcgan-64",
            model="dcgan-64",
            **_EMOJI_64,
            batch_size=64,
            steps=25_000,
            source="pytorch/examples dcgan: Adam 2e-4 (0.5, 0.999), batch 64, 25 epochs of any images",
        ),
        Recipe(
            name="wgan-gp-28",
            model="dcgan-28",
            model_options={"dropout": 0.0},
            batch_size=64,
            steps=20_000,
            **_WGAN_GP,
            betas=(0.0, 0.9),
            source="Gulrajani et al. 2017 (arXiv:1704.00028), algorithm 1; networks of dcgan-28 without dropout",
        ),
        Recipe(
            name="wgan-gp-64",
            model="dcgan-64",
            model_options={"d_norm": False},
            **_EMOJI_64,
            batch_size=64,
            steps=50_000,
            **_WGAN_GP,
            betas=(0.0, 0.9),
            source="Gulrajani et al. 2017 (arXiv:1704.00028), algorithm 1; DCGAN networks, no norm in the critic",
        ),
        Recipe(
            name="r1-dcgan-64",
            model="dcgan-64",
            model_options={"d_norm": False},
            **_EMOJI_64,
            batch_size=64,
            steps=50_000,
            penalty="r1",
            penalty_weight=10.0,
            betas=(0.0, 0.99),
            g_lr=1e-4,
            d_lr=1e-4,
            ema=0.999,
            source="Mescheder et al. 2018 (arXiv:1801.04406): R1 with gamma 10, lr 1e-4, averaged generator; "
            "Adam's betas after StyleGAN2, networks of dcgan-64 with no norm in the discriminator",
        ),
        Recipe(
            name="sngan-32",
            model="sngan-32",
            **_EMOJI_32,
            latent=128,
            batch_size=64,
            steps=50_000,
            loss="hinge",
            d_steps=5,
            betas=(0.0, 0.9),
            source="Miyato et al. 2018 (arXiv:1802.05957): hinge, Adam 2e-4 (0, 0.9), 5 D updates, batch 64",
        ),
        Recipe(
            name="pix2pix",
            model="pix2pix",
            model_options={"g_width": 32, "d_width": 32},
            domain="pairs",
            **_EMOJI_64,
            batch_size=8,
            steps=20_000,
            sample_count=16,
            source="Isola et al. 2017 (arXiv:1611.07004): U-Net with skips, PatchGAN, cross-entropy and 100 times L1, "
            "Adam 2e-4 (0.5, 0.999); 64 pixels, half of the paper's widths and batches of 8 for a CPU, test-time norm "
            "by running statistics; the paper's are image_size=256 and model_options g_width=64, d_width=64",
        ),
        Recipe(
            name="cyclegan",
            model="cyclegan",
            model_options={"g_width": 32, "d_width": 32, "norm": "layer"},
            domain="unpaired",
            domain_options={"identity": 0.0},
            **_EMOJI_64,
            batch_size=2,
            steps=40_000,
            loss="lsgan",
            sample_count=8,
            source="Zhu et al. 2017 (arXiv:1703.10593): residual generators, LSGAN, 10 times the cycle loss, a history "
            "of 50 fakes, Adam 2e-4 (0.5, 0.999); layer norm where it has instance norm, which hides how bright "
            "a flat thing is; 64 pixels, half the widths and batches of 2 for a CPU, constant rates; the "
            "paper's are image_size=256 and model_options g_width=64, d_width=64, norm=instance, and for "
            "paintings domain_options.identity=0.5",
        ),
        Recipe(
            name="r3gan",
            model="r3gan",
            **_EMOJI_32,
            latent=64,
            batch_size=64,
            steps=50_000,
            loss="relativistic",
            penalty="r1r2",
            penalty_weight=0.05,
            betas=(0.0, 0.99),
            ema=0.999,
            schedule="cosine",
            source="Huang et al. 2024 (arXiv:2501.05441): relativistic pairing, R1 and R2 every step with their CIFAR "
            "weight 0.05 (theirs falls to 0.005), its residual block twice a resolution, resampling by [1, 3, 3, 1], "
            "Adam 2e-4 (0, 0.99) falling by a cosine; width 128 where theirs is 768",
        ),
        Recipe(
            name="r3gan-small",
            model="r3gan-small",
            **_EMOJI_32,
            latent=64,
            batch_size=64,
            steps=50_000,
            loss="relativistic",
            penalty="r1r2",
            penalty_weight=0.05,
            betas=(0.0, 0.99),
            ema=0.999,
            source="Huang et al. 2024 (arXiv:2501.05441): relativistic pairing, R1 and R2 every step with their CIFAR "
            "weight 0.05 (theirs falls to 0.005), a small network, constant rates",
        ),
        Recipe(
            name="stylegan2-small",
            model="stylegan2-small",
            **_EMOJI_32,
            latent=64,
            batch_size=32,
            steps=50_000,
            penalty="r1",
            penalty_weight=0.1,
            penalty_every=16,
            path_length=2.0,
            betas=(0.0, 0.99),
            g_lr=2e-3,
            d_lr=2e-3,
            ema_half_life=10_000.0,
            source="Karras et al. 2020 (arXiv:1912.04958): non-saturating loss, R1 at every 16th step, path lengths at "
            "every 4th on half of the batch, mixed styles, average as arXiv:2006.06676; at most 64 channels; Adam 2e-3 "
            "(0, 0.99), not corrected for the steps without a penalty; R1's weight 0.1 for 32 pixels",
        ),
        Recipe(
            name="chargan",
            model="chargan",
            domain="text",
            data="sentences",
            latent=128,
            batch_size=64,
            steps=10_000,
            **(_WGAN_GP | {"d_steps": 1, "g_lr": 1e-3, "d_lr": 1e-3}),
            schedule="linear",
            betas=(0.5, 0.9),
            eval_every=500,
            source="Gulrajani et al. 2017 (arXiv:1704.00028), section 5.3: WGAN-GP on one-hot characters, Adam "
            "(0.5, 0.9); an eighth of its width, so 1e-3 falling to 0 where it has 1e-4, and 1 D update where its code "
            "has 10",
        ),
        Recipe(
            name="wavegan",
            model="wavegan",
            domain="sound",
            data="drums",
            latent=100,
            batch_size=16,
            steps=6_000,
            loss="wasserstein",
            penalty="wgan-gp",
            penalty_weight=10.0,
            penalty_every=2,
            g_lr=4e-4,
            d_lr=4e-4,
            betas=(0.0, 0.9),
            schedule="linear",
            ema_half_life=5_000.0,
            sample_count=32,
            sample_every=500,
            eval_every=500,
            source="Donahue et al. 2019 (arXiv:1802.04208): WGAN-GP; of Karras et al. 2018 (arXiv:1710.10196) one D "
            "update where it has 5 and an averaged generator; Adam 4e-4 (0, 0.9) towards 0 where it has 1e-4 (0.5, "
            "0.9), a penalty at every second step, batch 16 where it has 64, a quarter of its width and length",
        ),
        Recipe(
            name="hifigan-small",
            model="hifigan-small",
            domain="vocoder",
            data="drums",
            batch_size=4,
            steps=2_500,
            loss="lsgan",
            g_lr=2e-3,
            d_lr=5e-4,
            betas=(0.8, 0.99),
            schedule="linear",
            ema_half_life=2_000.0,
            sample_count=16,
            sample_every=250,
            held_out=64,
            eval_every=250,
            source="Kong et al. 2020 (arXiv:2010.05646): LSGAN, 2 times feature matching, 45 times the distance of mel "
            "spectrograms, that in windows of three lengths as Kumar et al. 2023 (arXiv:2306.06546); 8 kHz and an "
            "eighth of V1's width or less; Adam (0.8, 0.99) with 2e-3 for G and 5e-4 for D towards 0 where it has "
            "2e-4, batches of 4 whole sounds where it has 16 pieces, an averaged generator, no weight decay",
        ),
        Recipe(
            name="sagan-32",
            model="sagan-32",
            **_EMOJI_32,
            latent=128,
            batch_size=64,
            steps=50_000,
            loss="hinge",
            betas=(0.0, 0.9),
            g_lr=1e-4,
            d_lr=4e-4,
            source="Zhang et al. 2019 (arXiv:1805.08318): self-attention, spectral norm in both networks, hinge, Adam "
            "(0, 0.9) with 1e-4 for G and 4e-4 for D, one D update; theirs has labels (--conditional) and batch 256",
        ),
        Recipe(
            name="vit-gan-small",
            model="vit-gan-small",
            **_EMOJI_32,
            batch_size=32,
            steps=50_000,
            penalty="r1",
            penalty_weight=1.0,
            betas=(0.0, 0.99),
            ema=0.999,
            source="its own: a small transformer in the discriminator (Dosovitskiy et al. 2021, arXiv:2010.11929), "
            "tamed by R1 with the weight of recipe fastgan (Mescheder et al. 2018, arXiv:1801.04406), G of dcgan-64",
        ),
        Recipe(
            name="clip-32",
            model="clip-32",
            domain="clips",
            data="moving-garments",
            image_size=32,
            channels=1,
            latent=64,
            batch_size=16,
            steps=20_000,
            penalty="r1",
            penalty_weight=0.1,
            penalty_every=4,
            betas=(0.0, 0.99),
            g_lr=4e-4,
            d_lr=4e-4,
            ema_half_life=10_000.0,
            sample_count=16,
            eval_every=500,
            source="TGAN's generator (Saito et al. 2017, arXiv:1611.06624) and a discriminator of frames with "
            "temporal shift (Lin et al. 2019, arXiv:1811.08383); loss, rates and average of the recipe fastgan, R1 "
            "with the weight 0.1 for 32 pixels, as stylegan2-small, at every 4th step",
        ),
    )
}


def recipes() -> dict[str, Recipe]:
    """The named recipes."""
    return dict(_RECIPES)
