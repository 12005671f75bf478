"""Drawing from a generator: latents, pictures without side effects, walks, generators of runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import models
from fastgan.data.memory import require

from .recipes import OWN, Recipe
from .rundir import RunDirectory

__all__ = ["class_number", "class_rows", "draw", "evaluating", "fill", "latents", "load_generator", "walk"]

WIDEST = 16  # pictures a row in a sheet of classes: 32 of them in a page are too small to see


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every submodule's own mode again afterwards.

    A plain ``module.train()`` would also wake what a user has put to sleep. In eval mode batch norm uses its
    running statistics: drawing samples neither changes them nor draws random numbers.
    """
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def latents(count: int, size: int, *, seed: int, truncation: float | None = None) -> Tensor:
    """Normal latents ``[count, size]`` on the CPU, the same on every machine for one seed.

    With `truncation` T values come from the normal distribution cut to [-T, T], the truncation trick of Brock
    et al. 2019 (arXiv:1809.11096): a smaller T gives more typical and less varied images.
    """
    require(8 * count * size, "cpu", f"latents: {count:,} of {size:,} numbers")
    generator = torch.Generator().manual_seed(seed)
    if truncation is None:
        return torch.randn(count, size, generator=generator)
    if not 0 < truncation < float("inf"):
        raise ValueError(f"latents: truncation must be positive and finite, got {truncation}")
    # Inverse of the cut distribution function; float64, since fp32 would fold the tails of a large T onto it.
    edge = math.erf(truncation / math.sqrt(2))
    uniform = torch.rand(count, size, generator=generator, dtype=torch.float64) * 2 - 1
    z = math.sqrt(2) * torch.erfinv(uniform * edge)
    return z.clamp(-truncation, truncation).float()


@torch.no_grad()
def draw(generator: nn.Module, z: Tensor, labels: Tensor | None = None, *, batch: int = 256) -> Tensor:
    """Images ``[N, C, H, W]`` of latents ``[N, ...]`` in eval mode, fp32 on the CPU; `z` may lie anywhere.

    labels: int64 ``[N]`` for a conditional generator, else None.
    """
    device = next(generator.parameters()).device
    parts = z.split(batch)
    classes = [None] * len(parts) if labels is None else labels.split(batch)
    images: list[Tensor] = []
    with evaluating(generator):
        for part, some in zip(parts, classes, strict=True):
            inputs = (part.to(device),) if some is None else (part.to(device), some.to(device))
            images.append(generator(*inputs).float().cpu())
            if len(images) == 1:  # the parts and their whole
                require(8 * len(z) * images[0][0].numel(), "cpu", f"samples: {len(z):,} pictures")
    return torch.cat(images)


def evenly(count: int, wanted: int) -> Tensor:
    """At most `wanted` of the numbers below `count`, evenly spread, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()


def walk(z: Tensor, frames: int, *, mode: str = "slerp") -> Tensor:
    """`frames` latents on the closed path through the latents ``[K, size]``, K >= 2, evenly spaced.

    mode "lerp" walks straight lines. "slerp" walks great arcs (White 2016, arXiv:1609.04468), which keeps the
    length that normal latents have; between parallel latents it is the straight line.
    """
    if mode not in ("slerp", "lerp"):
        raise ValueError(f"walk: mode must be slerp or lerp, got {mode!r}")
    if z.ndim != 2 or z.shape[0] < 2 or frames < 1:
        raise ValueError(f"walk: it needs 2 latents [K, size] and 1 frame, got {tuple(z.shape)} and {frames}")
    # both ends and the path between them, in float64
    require(3 * 8 * frames * z.shape[1], "cpu", f"walk: {frames:,} frames of {z.shape[1]:,} numbers")
    t = torch.arange(frames, dtype=torch.float64) * z.shape[0] / frames
    start = t.long().clamp(max=z.shape[0] - 1)
    a, b = z[start].double(), z[(start + 1) % z.shape[0]].double()
    t = (t - start)[:, None]
    if mode == "lerp":
        return torch.lerp(a, b, t).float()
    cosine = nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)[:, None]
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine.clamp(min=1e-12)
    return torch.where(sine > 1e-4, arc, torch.lerp(a, b, t)).float()


def class_rows(count: int, classes: int) -> tuple[Tensor, int]:
    """(labels int64, columns) of a sheet with a row a class, of about `count` pictures; a class has several rows where
    they divide more than `WIDEST` pictures into equal parts."""
    classes = min(classes, count)
    each = count // classes
    require(8 * classes * each, "cpu", f"labels: {count:,} numbers")
    parts = [columns for columns in range(WIDEST // 2, WIDEST + 1) if each % columns == 0]
    return torch.arange(classes).repeat_interleave(each), max(parts) if parts and each > WIDEST else each


def class_number(config: Mapping[str, Any], label: str) -> int:
    """The class that `label`, a name or a number, means in a conditional run. Raises ValueError for any other."""
    recipe, run = config["recipe"], config.get("classes") or []
    if not recipe.get("conditional"):
        raise ValueError(f"label: it needs a run trained with --conditional, {recipe['name']} takes none")
    if label in run:
        return int(run.index(label))
    if label.isdecimal() and int(label) < recipe["classes"]:
        return int(label)
    known = ", ".join(run[:12]) + (", ..." if len(run) > 12 else "")
    raise ValueError(f"label: it must be below {recipe['classes']} or one of {known}, got {label!r}")


def load_generator(
    run: str | Path,
    *,
    device: str | torch.device = "cpu",
    generator: nn.Module | None = None,
    best: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """The generator of a run directory's newest sound checkpoint, in eval mode, and the run's config.

    It is the averaged one if the run kept one. With `best` it is the one of the lowest kernel distance, where the run
    evaluated. A run that was started with networks of its own needs `generator`, an instance to load the weights into.
    """
    directory = RunDirectory(run)
    config = directory.read_config()
    found = directory.best() if best else directory.newest()
    if found is None:
        raise ValueError(f"run: {run} must hold a checkpoint, it has none yet")
    if generator is None:
        if config["models"] != "recipe":
            raise ValueError(f"run: {run} was trained with networks of its own, pass generator= to load its weights")
        generator, _ = build_models(Recipe.from_dict(config["recipe"]))
    weights = found.state.get("sampler") or found.state.get("generator")
    if not weights:
        raise ValueError(f"run: {found.path} must hold a generator, it lacks one")
    fill(generator, weights, f"{found.path}: generator")
    return generator.to(device).eval(), config


def fill(module: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """`state` into `module`. Raises ValueError, which begins with `what`, where they do not fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = " ".join(str(error).partition("\n")[2].strip().partition("\n")[0].split()) or str(error)
        raise ValueError(f"run: {what} must fit the networks, it does not: {first}") from error


def build_models(recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """The recipe's networks, freshly initialised.

    Of the recipe's own fields and its `domain_options` a model is given those that it has options of the same name for.
    """
    if recipe.conditional and not recipe.classes:
        raise ValueError("recipe: a conditional run must have its number of classes, set classes or train on labels")
    own = {name: getattr(recipe, name) for name in OWN if name != "classes" or recipe.conditional}
    known = models.options(recipe.model)
    given = {name: value for name, value in (recipe.domain_options | own).items() if name in known}
    return models.build(recipe.model, **given, **recipe.model_options)
