"""Differentiable augmentation: what the discriminator sees of real and generated images alike.

Source: Zhao et al. 2020, Differentiable Augmentation for Data-Efficient GAN Training (arXiv:2006.10738): brightness,
saturation and contrast; translation by up to an eighth of a side; a square of half a side cut out. Every operation
takes a batch at once, draws from torch's global generator, is linear in the pixels up to a constant, and can be
differentiated as often as the discriminator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan._layout import is_channels_last
from fastgan.trace.layout import NCHW, NHWC, ordered

from .ada import Ada

__all__ = ["ADAPTIVE", "POLICIES", "Augment", "policy_of"]

ADAPTIVE = "ada"  # the policy of `Ada`

SHIFT, CUT = 1 / 8, 1 / 2  # of a side


class _Shift(torch.autograd.Function):
    """y[n, :, i, j] = x[n, :, i + rows[n], j + columns[n]], 0 outside; its adjoint is the opposite shift. most: no
    column moves by more. Results are contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, most: int) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.most = most
        n, c, height, width = x.shape
        # All rows one after another, `most` zeros before each, and a row of zeros at the end: each row of the result is
        # `width` numbers in a row from some place, copied at once. Pixel by pixel the copy takes 7 to 13 times as long.
        count, stride = n * c * height, width + most
        padded = x.new_zeros(most + count * stride + width)
        padded[most:-width].view(count, stride)[:, :width].copy_(x.reshape(count, width))
        row = torch.arange(height, device=x.device) + rows[:, None, None]
        plane = torch.arange(n * c, device=x.device).view(n, c, 1) * height
        at = most + (plane + row) * stride + columns[:, None, None]
        at = torch.where((row >= 0) & (row < height), at, most + count * stride)
        windows = padded.as_strided((len(padded) - width + 1, width), (1, 1))
        return windows.index_select(0, at.flatten()).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, columns = ctx.saved_tensors
        return _Shift.apply(grads[0], -rows, -columns, ctx.most), None, None, None


def _uniform(x: Tensor) -> Tensor:
    return torch.rand(len(x), 1, 1, 1, device=x.device, dtype=x.dtype)


def colour(x: Tensor) -> Tensor:
    """Brightness by up to 0.5, saturation by 0 to 2 (of colour images), contrast by 0.5 to 1.5."""
    shift = _uniform(x) - 0.5
    saturation = 2 * _uniform(x) if x.shape[1] > 1 else None
    contrast = _uniform(x) + 0.5
    grey = x.mean(1, keepdim=True)
    # (x + shift) is drawn towards its grey, and the result towards the image's mean, which saturation keeps: together
    # one affine map of pixel, grey and mean, in one pass over x where the three by themselves take five.
    around = (1 - contrast) * grey.mean((2, 3), keepdim=True) + shift
    if saturation is None:
        return torch.addcmul(around, x, contrast)
    return torch.addcmul(contrast * (1 - saturation) * grey + around, x, contrast * saturation)


def translation(x: Tensor) -> Tensor:
    """By up to an eighth of a side each way; black is where nothing comes from (0: mid-grey in [-1, 1])."""
    most = [int(side * SHIFT + 0.5) for side in x.shape[2:]]
    shifts = [torch.randint(-m, m + 1, (len(x),), device=x.device) for m in most]
    moved: Tensor = _Shift.apply(x, *shifts, most[1])
    return moved


def cutout(x: Tensor) -> Tensor:
    """A square of half a side becomes 0; its centre lies anywhere in the image."""
    inside = []
    for side in x.shape[2:]:
        size = int(side * CUT + 0.5)
        centre = torch.randint(0, side + (1 - size % 2), (len(x), 1), device=x.device)
        start = centre - size // 2
        at = torch.arange(side, device=x.device)
        inside.append((at >= start) & (at < start + size))
    cut = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x * ~cut


POLICIES: dict[str, Callable[[Tensor], Tensor]] = {"colour": colour, "translation": translation, "cutout": cutout}


def policy_of(text: str) -> tuple[str, ...]:
    """The operations that a text names, such as "colour,translation,cutout", or ("ada",). ValueError for any other."""
    names = tuple(name.strip() for name in text.split(","))
    names = tuple("colour" if name == "color" else name for name in names)
    if names != (ADAPTIVE,) and (not set(names) <= set(POLICIES) or len(set(names)) < len(names)):
        raise ValueError(f"recipe: augment must be none, {ADAPTIVE} or some of {','.join(POLICIES)}, got {text!r}")
    return names


class Augment:
    """The discriminator's input: `policy` or `ada` first, then normal noise of deviation `noise`, a 0-dim tensor on the
    device.

    Noise that fades as the run goes on: Sonderby et al. 2017 (arXiv:1610.04490), "instance noise".
    """

    def __init__(self, policy: tuple[str, ...], noise: Tensor | None = None, ada: Ada | None = None):
        self.policy, self.noise, self.ada = policy, noise, ada

    def __call__(self, x: Tensor) -> Tensor:
        """[N, C, H, W] images in about [-1, 1] -> the same shape."""
        if self.policy:
            # colours and squares of three channels beside each other take 2 to 8 times as long
            channels_last, x = is_channels_last(x), ordered(x, NCHW)
            for name in self.policy:
                x = POLICIES[name](x)
            x = ordered(x, NHWC) if channels_last else x
        if self.ada is not None:
            x = self.ada(x)
        return x if self.noise is None else x + self.noise.to(x.dtype) * torch.randn_like(x)

    def observe(self, logits_real: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Follow the discriminator's logits on a batch of real images; returns numbers for the log."""
        return {} if self.ada is None else {"augment_p": self.ada.observe(logits_real)}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must find."""
        return {} if self.ada is None else {"ada": self.ada.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        if self.ada is not None:
            self.ada.load_state_dict(state["ada"])
