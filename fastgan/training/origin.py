"""What a run begins from: a recipe and new images, or a run directory and the images that it was trained on."""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgan._version import __version__
from fastgan.data.fingerprint import difference, fingerprint
from fastgan.doctor import machine
from fastgan.domains import domain_of

from .checkpoint import Found
from .progress import counter
from .recipes import Recipe, recipes
from .rundir import RunDirectory

__all__ = ["changed_images", "configuration", "load_samples", "open_run", "recipe_of"]

# What a resumed run may change: its length, how often it writes and how much of that stays. Anything else would not be
# the same run.
MAY_CHANGE = (
    *("steps", "sample_every", "checkpoint_every", "log_every", "eval_every", "watch_every"),
    *("keep_checkpoints", "keep_samples", "keep_records"),
)


def open_run(
    out: str | Path | None, resume: str | Path | None, overwrite: bool, *, owner: bool = True
) -> tuple[RunDirectory, dict[str, Any] | None, Found | None]:
    """The run directory; for a resumed run also its configuration and its newest sound checkpoint, if it has one.

    owner: whether this process will write there, so that nothing else may.
    """
    if resume is not None:
        if overwrite or (out is not None and Path(out) != Path(resume)):
            raise ValueError(
                "resume: it goes on in the run's own directory, give neither another out (--out) nor overwrite"
            )
        directory = RunDirectory(resume)
        saved = directory.read_config()
        if owner:
            directory.check_free()
        return directory, saved, directory.newest()
    if out is None:
        raise ValueError("training: out must be given, the directory that the run is written to")
    directory = RunDirectory(out)
    if owner:
        directory.check_new(overwrite=overwrite)
    return directory, None, None


def recipe_of(config: Recipe | str | Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> Recipe:
    """The recipe that `config` stands for, checked against the saved one of a resumed run."""
    before = Recipe.from_dict(saved["recipe"]) if saved else None
    if config is None:
        if before is None:
            raise ValueError("training: config must be a recipe, its name or a dict of its fields, got None")
        return before
    if isinstance(config, str):
        named = recipes()
        if config not in named:
            raise ValueError(f"recipe: there is no recipe {config!r}, choose one of {', '.join(named)}")
        config = named[config]
    recipe = config if isinstance(config, Recipe) else Recipe.from_dict(config)
    if before is None:
        return recipe
    if recipe.precision == "auto":
        recipe = recipe.replace(precision=before.precision)
    if recipe.conditional and not recipe.classes:
        recipe = recipe.replace(classes=before.classes)
    # what is left out is as it was, also what the data decided
    recipe = recipe.replace(domain_options=before.domain_options | recipe.domain_options)
    for name, value in before.to_dict().items():
        if name not in (*MAY_CHANGE, "data", "labels") and getattr(recipe, name) != value:
            raise ValueError(
                f"resume: {name} must stay {value!r}, got {getattr(recipe, name)!r}; "
                f"a resumed run may change {', '.join(MAY_CHANGE)}"
            )
    return recipe


def load_samples(
    recipe: Recipe,
    given: Any,
    saved: Mapping[str, Any] | None,
    device: torch.device,
    *,
    quiet: bool = False,
) -> tuple[Recipe, Any]:
    """The samples given, else those of the recipe, whose path becomes absolute: a run can go on from anywhere.

    The recipe comes back with what the samples decide, such as the number of classes. quiet: shows no bar meanwhile.
    """
    if given is None and saved and saved.get("images", {}).get("given"):
        raise ValueError("resume: the run was trained on images of its own, pass images= again")
    if given is None:
        recipe = domain_of(recipe).absolute()
        domain = domain_of(recipe)
        domain.progress = None if quiet else counter(domain.noun)
        try:
            given = domain.load(device)
        except ValueError as error:
            if not saved:
                raise
            raise ValueError(
                f"resume: the run's {domain.noun} must be where they were, in {recipe.data}: {error}; "
                "--data PATH says where they are now"
            ) from error
    return domain_of(recipe).fit(given), given


def changed_images(images: Any, saved: Mapping[str, Any] | None, allow: bool) -> bool:
    """Whether a resumed run's images differ from those it began with. Raises ValueError unless that is allowed."""
    if not saved or "images" not in saved:
        return False
    differs = difference(saved["images"], fingerprint(images))
    if differs and not allow:
        raise ValueError(
            f"resume: the images must be those that the run began with, {images.name} has {differs}; "
            "restore them, or insist with --allow-changed-data (allow_changed_data=True)"
        )
    return bool(differs)


def configuration(
    recipe: Recipe, images: Any, saved: Mapping[str, Any] | None, device: torch.device, **facts: Any
) -> dict[str, Any]:
    """What config.json holds; `facts`: what else a resumed run asks for."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    given = facts.pop("images_given")
    config = {
        "fastgan": __version__,
        "run": saved.get("run") if saved else secrets.token_hex(8),
        "started": saved["started"] if saved else now,
        "device": str(device),
        **facts,
        "recipe": recipe.to_dict(),
        "classes": images.classes if recipe.conditional else None,
        "images": {"given": given, **fingerprint(images)},
        "machine": machine(device),
    }
    # As JSON gives it back: plain values only, which a checkpoint may hold.
    return dict(json.loads(json.dumps(config)))
