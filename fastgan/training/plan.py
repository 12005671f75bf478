"""What a recipe would do here: the plan that ``fastgan train --dry-run`` prints. Nothing is written."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import nn

from fastgan.choice import backend as force_backend
from fastgan.domains import domain_of

from .assembly import assemble, precision_of, resolve_device
from .evaluation import LEAST, SHARE
from .origin import load_samples
from .progress import duration, memory_mb
from .recipes import Recipe

__all__ = ["chosen_batch", "measure", "plan"]

_STEPS = 5  # timed steps at most
_SECONDS = 10.0  # and time for them
_SIZES = (8, 16, 32, 64, 128, 256, 512)
_GAIN = 1.1


def measure(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Seconds a step and memory, from two steps to warm up and up to five timed ones on random samples."""
    generator, discriminator, step = assemble(recipe, device)
    domain = domain_of(recipe)
    drawn = [domain.probe(device)] * recipe.d_steps

    def one() -> float:
        begin = time.perf_counter()
        float(step(*domain.inputs(drawn))["g_loss"])  # reading it waits for the device
        return time.perf_counter() - begin

    one()
    one()
    times = [one()]
    while len(times) < _STEPS and sum(times) < _SECONDS:
        times.append(one())
    return {
        "seconds": sorted(times)[len(times) // 2],
        "timed": len(times),
        "memory_mb": memory_mb(device),
        "parameters": {"generator": _count(generator), "discriminator": _count(discriminator)},
    }


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def chosen_batch(recipe: Recipe, *, device: str = "auto", backend: str | None = None) -> Recipe:
    """The recipe at the smallest batch size, a power of two, of which twice as much gains less than 10 % in images/s.

    Sizes that the free memory does not hold are not tried. A batch size is part of how a network learns: this is the
    fastest, not the best. Prints a line for each size that is measured.
    """
    place = resolve_device(device)
    if recipe.conditional and not recipe.classes:
        recipe, _ = load_samples(recipe, None, None, torch.device("cpu"))
    best, speed = 0, 0.0
    with force_backend(backend) if backend else contextlib.nullcontext():
        for size in _SIZES:
            one = recipe.replace(batch_size=size)
            try:
                found = size * recipe.d_steps / measure(one, place)["seconds"]
            except ValueError:  # what it needs is counted first: more than there is
                if not best:
                    raise
                break
            print(f"batch size {size}: {found:,.0f} images/s")
            if found < _GAIN * speed:
                break
            best, speed = size, found
    return recipe.replace(batch_size=best)


def _disk(recipe: Recipe, parameters: dict[str, int]) -> float:
    """MB that the run keeps: checkpoints of weights, Adam's two moments and the average, the best, and pictures."""
    state = 3 * sum(parameters.values()) + parameters["generator"] * recipe.averaged
    kept = recipe.keep_checkpoints * state + parameters["generator"] * bool(recipe.eval_every)
    grids = 2 + recipe.steps // recipe.sample_every if recipe.sample_every else 2
    grids = min(grids, recipe.keep_samples or grids)
    return (4 * kept + grids * recipe.sample_count * recipe.channels * recipe.image_size**2) / 1e6


def _at_least_a_digit(speed: float) -> str:
    """1,234 and 3 and 0.04."""
    return f"{speed:,.0f}" if speed >= 1 else f"{speed:.1g}"


def _on_top(recipe: Recipe) -> str:
    """What the time of the steps leaves out."""
    if not recipe.eval_every:
        return ""
    count, share = recipe.steps // recipe.eval_every, f"{SHARE:.0%}"
    return f"; {count:,} evaluations on top, about {share} more, or what {LEAST} {domain_of(recipe).noun} each take"


def plan(recipe: Recipe, *, device: str = "auto", backend: str | None = None) -> str:
    """The plan as text: every field, parameter counts, and time and memory measured on this machine."""
    place = resolve_device(device)
    if recipe.conditional and not recipe.classes:
        recipe, _ = load_samples(recipe, None, None, torch.device("cpu"))
    with force_backend(backend) if backend else contextlib.nullcontext():
        found = measure(recipe, place)
    rows = {key: str(value) for key, value in recipe.to_dict().items()}
    rows["precision"] = str(precision_of(recipe, place))
    rows["device"] = f"{place}, backend {backend or 'auto'}"
    rows["parameters"] = ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items())
    rows["images seen"] = f"{recipe.steps * recipe.batch_size * recipe.d_steps:,}"
    what = "peak on the GPU" if place.type == "cuda" else "resident, the images themselves come on top"
    rows["memory"] = f"{found['memory_mb']:,.0f} MB ({what})"
    speed = recipe.batch_size * recipe.d_steps / found["seconds"]
    rows["a step"] = (
        f"{found['seconds'] * 1e3:.1f} ms, {_at_least_a_digit(speed)} images/s "
        f"(measured here: median of {found['timed']} steps on random images, after 2 to warm up)"
    )
    rows["disk"] = f"about {_disk(recipe, found['parameters']):,.0f} MB (checkpoints kept, pictures before compression)"
    rows["in all"] = f"{duration(found['seconds'] * recipe.steps)} for {recipe.steps:,} steps{_on_top(recipe)}"
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())
