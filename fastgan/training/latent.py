"""Directions in a generator's latent space, and the latents of a given image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastgan.metrics import features, load_backbone

from .sampling import draw, evaluating

__all__ = ["class_direction", "class_directions", "principal_directions", "project"]

PICTURES = 512  # that directions are found from
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def principal_directions(
    generator: nn.Module, z: Tensor, labels: Tensor | None = None, *, count: int = 8, of: str = "pictures"
) -> Tensor:
    """[count, latent] directions of length 1 along which pictures or activations change most, the most first.

    The principal components of pictures [N, pixels], or, after Harkonen et al. 2020 (arXiv:2004.02546), of an early
    layer's activations, and for each the latents' regression on its coordinate.

    Args:
        generator: in whatever mode it is, it runs in eval mode.
        z: [N, latent], N above `count`.
        labels: [N] for a conditional generator.
        count: of directions.
        of: "pictures", or "activations": what the generator's second layer with a weight takes.

    Raises:
        ValueError: fewer latents than directions, a direction that nothing follows, another `of`, or a generator
            without a second layer.
    """
    if of not in ("pictures", "activations"):
        raise ValueError(f'directions: of must be "pictures" or "activations", got {of!r}')
    if not 0 < count < len(z):
        raise ValueError(f"directions: there must be 1 to {len(z) - 1} of {len(z)} latents, got {count}")
    values = (draw(generator, z, labels) if of == "pictures" else _activations(generator, z, labels)).flatten(1)
    values = values - values.mean(0)
    _, _, axes = torch.pca_lowrank(values, count, center=False, niter=4)
    coordinates = values @ axes  # [N, count]
    return _unit((coordinates - coordinates.mean(0)).T @ (z - z.mean(0)))


def _activations(generator: nn.Module, z: Tensor, labels: Tensor | None) -> Tensor:
    """[N, values] on the CPU: the second layer's input, which is the first layer's output after norm and activation."""
    called: list[nn.Module] = []
    layers = [m for m in generator.modules() if isinstance(m, LAYERS)]
    with _looking(layers, lambda layer, x: called.append(layer)):
        draw(generator, z[:1], None if labels is None else labels[:1])
    second = next((layer for layer in called if layer is not called[0]), None)
    if second is None:
        raise ValueError(
            f"directions: a generator must have two layers for activations, got {type(generator).__name__}"
        )
    found: list[Tensor] = []
    with _looking([second], lambda layer, x: found.append(x.detach().float().cpu())):
        draw(generator, z, labels)
    return torch.cat(found)


@contextlib.contextmanager
def _looking(layers: Sequence[nn.Module], look: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Within: `look` gets each of these layers and what it takes, in the order of their calls."""
    handles = [layer.register_forward_pre_hook(lambda layer, inputs: look(layer, inputs[0])) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def class_direction(z: Tensor, is_in: Tensor) -> Tensor:
    """[latent] direction of length 1 from latents outside of a class to those inside: the difference of their means.

    z: [N, latent]; is_in: bool [N], such as what a classifier says of the pictures. Raises ValueError where one side is
    empty.
    """
    if not 0 < int(is_in.sum()) < len(z):
        raise ValueError(f"directions: both sides must have latents, got {int(is_in.sum())} of {len(z)} inside")
    return _unit((z[is_in].mean(0) - z[~is_in].mean(0))[None])[0]


def class_directions(generator: nn.Module, z: Tensor, images: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """[latent] directions of length 1 towards each class that the pictures of z [N, latent] show.

    A picture has the class of the image (uint8 [M, C, H, W], labels int64 [M]) whose features on the backbone "small"
    are nearest. A class has no direction where no picture has it, or every picture.
    """
    backbone = load_backbone()
    made = features(draw(generator, z), backbone)
    shown = labels[torch.cdist(made, features(images, backbone)).argmin(1)]
    found = shown.unique().tolist()
    return {k: class_direction(z, shown == k) for k in found} if len(found) > 1 else {}


def _unit(rows: Tensor) -> Tensor:
    lengths = rows.norm(dim=1, keepdim=True)
    if not bool((lengths > 1e-12).all()):
        raise ValueError("directions: pictures must follow the latents, got a generator that ignores them")
    return rows / lengths


def project(
    generator: nn.Module, images: Tensor, labels: Tensor | None = None, *, starts: Tensor, steps: int = 200
) -> tuple[Tensor, Tensor]:
    """Latents whose pictures are nearest to `images`, by Adam on the squared difference of pixels.

    Args:
        generator: in whatever mode it is, it runs in eval mode.
        images: [N, C, H, W] in [-1, 1].
        labels: [N] for a conditional generator.
        starts: [K, latent]; each image begins at the one whose picture is nearest.
        steps: of Adam, at a rate of 0.05 that falls to 0.

    Returns:
        ([N, latent], [N] mean squared differences).

    Raises:
        ValueError: images of another size than the generator's.
    """
    device = next(generator.parameters()).device
    first = draw(generator, starts, None if labels is None else labels[:1].expand(len(starts)))
    if first.shape[1:] != images.shape[1:]:
        sizes = f"{list(first.shape[1:])}, got {list(images.shape[1:])}"
        raise ValueError(f"project: images must be as the generator's, [C, H, W] = {sizes}")
    nearest = torch.cdist(images.flatten(1), first.flatten(1)).argmin(1)
    z = starts[nearest].clone().to(device).requires_grad_()
    goal, inputs = images.to(device), () if labels is None else (labels.to(device),)
    adam = torch.optim.Adam([z], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)

    def distances() -> Tensor:
        return (generator(z, *inputs).float() - goal).square().flatten(1).mean(1)

    with evaluating(generator), torch.enable_grad():
        for _ in range(steps):
            (z.grad,) = torch.autograd.grad(distances().sum(), z)
            adam.step()
            schedule.step()
        with torch.no_grad():
            found = distances()
    return z.detach().cpu(), found.cpu()
