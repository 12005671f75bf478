"""What a recipe needs, counted before it is asked for: its networks and one batch on the meta device, which has shapes
and no memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastgan.data.memory import require
from fastgan.domains import domain_of

from .recipes import Recipe
from .sampling import build_models

__all__ = ["check"]

_FP32 = 4  # bytes; autocast keeps weights, gradients and moments in it
# A weight, its gradient and Adam's two moments.
_COPIES = 4


def check(recipe: Recipe, device: torch.device) -> None:
    """Raise ValueError where the recipe's networks cannot be built, cannot take its batch, or cannot fit in the free
    memory of `device`.

    The memory is a lower bound: weights, gradients, moments, the average, and what the layers of one forward of either
    network give, in 16 bits where the recipe computes so. What fits is never refused.
    """
    what = f"{recipe.model} at batch size {recipe.batch_size}"
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                generator, discriminator = build_models(recipe)
        except (RuntimeError, OverflowError) as error:  # sizes beyond 64 bits
            raise ValueError(f"recipe: {recipe.model} must have sizes that fit in memory: {_first(error)}") from error
        weights = sum(p.numel() for m in (generator, discriminator) for p in m.parameters()) * _COPIES
        if recipe.averaged:
            weights += sum(p.numel() for p in generator.parameters())
        require(weights * _FP32, device, f"recipe: the weights of {recipe.model} and their optimisers")
        activations = _activations(recipe, generator, discriminator, what)
    width = _FP32 if recipe.precision == "fp32" else 2
    require(weights * _FP32 + activations * width, device, f"recipe: a training step of {what}")
    drawn = recipe.d_steps * recipe.batch_size * math.prod(domain_of(recipe).shape)
    require(drawn, device, f"recipe: the samples of d_steps={recipe.d_steps} at batch size {recipe.batch_size}")


class _MisfitError(ValueError):
    """A model whose samples are not of the shape that the recipe's domain has."""


def _first(error: Exception) -> str:
    """An error's first line, without the C++ frames below it."""
    return str(error).partition("\n")[0].partition("Exception raised from")[0].strip()


def _activations(recipe: Recipe, generator: nn.Module, discriminator: nn.Module, what: str) -> int:
    """Numbers that the layers of both networks give for one batch; 0 where the meta device cannot tell."""
    domain = domain_of(recipe)
    with _counted(generator, discriminator) as count, contextlib.suppress(NotImplementedError):
        try:
            _, labels, z = domain.inputs([domain.probe("meta")])
            z = torch.empty(recipe.batch_size, recipe.latent, device="meta") if z is None else z[0]
            inputs, labels = z if isinstance(z, tuple) else (z,), () if labels is None else (labels[0],)
            made = generator(*inputs, *labels)
            if isinstance(made, Tensor) and (shape := tuple(made.shape[1:])) != domain.made:
                raise _MisfitError(
                    f"recipe: {recipe.model} must make what this recipe says of {domain.noun}, {list(domain.made)}, "
                    f"it makes {list(shape)}"
                )
            discriminator(made, *labels)
        except _MisfitError:
            raise
        except ValueError as error:  # batch norm of one value a channel has no variance
            raise ValueError(
                f"recipe: {what} must leave batch norm more than 1 value a channel: {_first(error)}"
            ) from error
        except (RuntimeError, OverflowError) as error:
            raise ValueError(
                f"recipe: {what} must fit {domain.noun} and have sizes that fit in memory: {_first(error)}"
            ) from error
    return sum(count)


@contextlib.contextmanager
def _counted(*networks: nn.Module) -> Iterator[list[int]]:
    """Within: the size of every output of a layer with weights, appended to the list."""
    sizes: list[int] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel())

    layers = [m for n in networks for m in n.modules() if not list(m.children()) and list(m.parameters())]
    hooks = [m.register_forward_hook(note) for m in layers]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()
