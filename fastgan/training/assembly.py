"""A recipe's networks, optimisers and step on a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import nn

from fastgan import _ranks
from fastgan.convert import convert
from fastgan.domains import Domain, domain_of

from . import needs
from .ada import Ada
from .adam import Adam
from .augment import ADAPTIVE, Augment, policy_of
from .precision import Precision, resolve
from .recipes import Recipe
from .sampling import build_models
from .schedules import average_decay
from .step import GANStep

__all__ = ["assemble", "precision_of", "resolve_device"]


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is the GPU if there is one. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: it must be auto, cpu or cuda[:N], got {str(device)!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: it must be auto, cpu or cuda[:N], got {str(device)!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device} must exist, this machine has {torch.cuda.device_count()} CUDA device(s)")
    return found


def precision_of(recipe: Recipe, device: torch.device, networks: Iterable[nn.Module] | None = None) -> Precision:
    """What the recipe's precision means on `device`; networks: in place of those of the recipe's model."""
    if networks is None and recipe.precision == "auto":
        # what cannot be built is refused with words of its own later on
        refused = contextlib.suppress(ValueError, RuntimeError, OverflowError)
        with refused, torch.random.fork_rng([]), torch.device("meta"):
            networks = build_models(recipe.replace(conditional=False))
    return resolve(recipe.precision, device, networks or ())


def augmentation(recipe: Recipe, device: torch.device) -> Augment | None:
    """What the recipe does to all that the discriminator sees, or None."""
    policy = policy_of(recipe.augment) if recipe.augment else ()
    noise = torch.tensor(recipe.instance_noise, device=device) if recipe.instance_noise else None
    ada = None
    if policy == (ADAPTIVE,):
        policy = ()
        ada = Ada(device, batch=recipe.batch_size, target=recipe.ada_target, images=recipe.ada_images)
    return Augment(policy, noise, ada) if policy or noise is not None or ada is not None else None


def assemble(
    recipe: Recipe,
    device: torch.device,
    networks: tuple[nn.Module, nn.Module] | None = None,
    capture: str = "auto",
    domain: Domain | None = None,
) -> tuple[nn.Module, nn.Module, GANStep]:
    """``(generator, discriminator, step)`` of a recipe on `device`: built, converted, with optimisers.

    networks: in place of those of the recipe's model. domain: what the samples are, None: as the recipe says.

    Seeds torch's global generators with the recipe's seed.
    """
    if networks is None:
        needs.check(recipe, device)
    torch.manual_seed(recipe.seed)
    generator, discriminator = networks or build_models(recipe)
    for module in (generator, discriminator):
        module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator, discriminator = convert(generator), convert(discriminator)

    def adam(module: nn.Module, lr: float) -> Adam:
        return Adam(module.parameters(), lr=lr, betas=recipe.betas, eps=recipe.adam_eps)

    step = GANStep(
        generator,
        discriminator,
        **(domain or domain_of(recipe)).step(generator, discriminator),
        g_optimizer=adam(generator, recipe.g_lr),
        d_optimizer=adam(discriminator, recipe.d_lr),
        loss=recipe.loss,
        penalty=recipe.penalty,
        penalty_weight=recipe.penalty_weight,
        penalty_every=recipe.penalty_every,
        penalty_sigma=recipe.penalty_sigma,
        d_steps=recipe.d_steps,
        low_memory=recipe.low_memory,
        ema=average_decay(recipe, 0),
        augment=augmentation(recipe, device),
        label_smoothing=(recipe.label_smoothing, recipe.fake_smoothing),
        grad_clip=recipe.grad_clip,
        precision=recipe.precision,
        capture=capture,
        sync=recipe.sync_statistics and _ranks.size(True) > 1,  # one process keeps its programs
    )
    return generator, discriminator, step
