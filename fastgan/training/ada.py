"""Adaptive discriminator augmentation: how often the discriminator's images are changed follows how sure it is of them.

Source: Karras et al. 2020, Training Generative Adversarial Networks with Limited Data (arXiv:2006.06676): the parts of
the pipeline of its appendix B that it found to help, pixel blitting, geometric and colour transformations, and the
control of section 3.1. The generator does not learn to draw an augmentation whose probability is below 1.

Every operation takes a batch at once and is linear in the pixels up to a constant, so that it can be differentiated as
often as the discriminator. Nothing is read back from a GPU.

Departures: an image that drew no change passes bit for bit; pixels are blitted without a filter; the probability is
kept below 1 too. On a GPU the derivative of a resampled image adds in no fixed order, as PyTorch's does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan._layout import dense, is_channels_last
from fastgan.functional import upfirdn2d

__all__ = ["Ada"]

EVERY = 4  # batches between two changes of the probability
SHIFT = 1 / 8  # of a side: the most that pixels are blitted by, the deviation that images are shifted by
SCALE, CONTRAST, SATURATION = 0.2, 0.5, 1.0  # deviations of base-2 logarithms
BRIGHTNESS = 0.2  # deviation, of pixels in [-1, 1]
LEAST = 4  # pixels a side, which the filter's reach reflects
# The low-pass filter of the orthogonal wavelet sym6: its even shifts are orthonormal, so that an image comes back from
# twice its size unchanged.
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
BEFORE = 5  # taps before a pixel's own
LATE = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6) - BEFORE  # fine pixels by which the filter delays
BILINEAR, NEAREST, REFLECTION = 0, 1, 2  # as ATen numbers them

Matrix = tuple[Tensor, Tensor, Tensor, Tensor]  # [[a, b], [c, d]], [N] each: (x, y) -> (a x + b y, c x + d y)
Shift = tuple[Tensor, Tensor]  # (x, y) in pixels, [N] each


class _Resample(torch.autograd.Function):
    """Pixels of x [N, C, H, W] at grid [N, H', W', 2], (x, y) of which -1 and 1 are the outer pixels' centres, the
    image reflected there; or the adjoint of that. Each is the derivative of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor, size: Sequence[int], mode: int, adjoint: bool) -> Tensor:
        """size: (H', W'), or (H, W) of the adjoint's result."""
        ctx.save_for_backward(grid)
        ctx.back = tuple(x.shape[2:]), mode, not adjoint
        if not adjoint:
            return torch.ops.aten.grid_sampler_2d(x, grid, mode, REFLECTION, True)
        shape_only = x.new_zeros(()).expand(*x.shape[:2], *size)
        rest = grid, mode, REFLECTION, True, [True, False]
        return torch.ops.aten.grid_sampler_2d_backward(x, shape_only, *rest)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grid,) = ctx.saved_tensors
        return _Resample.apply(grads[0], grid, *ctx.back), None, None, None, None


def _resample(x: Tensor, grid: Tensor, mode: int) -> Tensor:
    found: Tensor = _Resample.apply(x, grid.to(x.dtype), grid.shape[1:3], mode, False)
    return found


def _grid(x: Tensor, matrix: Matrix, shift: Shift, across: Tensor, down: Tensor, late: float = 0.0) -> Tensor:
    """[N, H', W', 2]: matrix (place - shift) + late / 2 in x [N, C, H, W], as `_Resample` takes it, for places in
    columns `across` [W'] and rows `down` [H']; all in pixels from the centre."""
    ends = x.new_ones(2)
    ends[0], ends[1] = 2 / (x.shape[3] - 1), 2 / (x.shape[2] - 1)
    a, b, c, d = matrix
    of_x = torch.stack([a, c], -1)[:, None] * (across - shift[0][:, None])[..., None]
    of_y = torch.stack([b, d], -1)[:, None] * (down - shift[1][:, None])[..., None]
    return (of_x * ends)[:, None] + ((of_y + late / 2) * ends)[:, :, None]


def _centred(count: int, like: Tensor) -> Tensor:
    """Places of so many pixels about their centre."""
    return torch.arange(count, device=like.device, dtype=like.dtype) - (count - 1) / 2


def blit(x: Tensor, matrix: Matrix, shift: Shift) -> Tensor:
    """Every pixel of the result is the pixel of x nearest to matrix (place - shift), places from the centre."""
    return _resample(x, _grid(x, matrix, shift, _centred(x.shape[3], x), _centred(x.shape[2], x)), NEAREST)


def transform(x: Tensor, matrix: Matrix, shift: Shift, low_pass: Tensor) -> Tensor:
    """x at matrix (place - shift), interpolated at twice its resolution between two passes of the filter `low_pass`."""
    reach = len(low_pass) - BEFORE - 1
    fine = upfirdn2d(torch.nn.functional.pad(x, (3, 2, 3, 2), mode="reflect"), low_pass, up=2)
    # Fine pixels lie half a pixel apart; the pass back reads BEFORE of them ahead of the first and `reach` behind the
    # last.
    across, down = (
        (torch.arange(-BEFORE, 2 * side - 1 + reach, device=x.device, dtype=x.dtype) - LATE - side + 1) / 2
        for side in (x.shape[3], x.shape[2])
    )
    there = _resample(fine, _grid(x, matrix, shift, across, down, LATE), BILINEAR)
    return upfirdn2d(there, low_pass, down=2, flip_filter=True)


def recolour(x: Tensor, brightness: Tensor, contrast: Tensor, flip: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Brightness is added, contrast multiplied, luma multiplied by `flip`, colours turned by `hue` about the grey axis
    and multiplied by `saturation`, in this order; [N] each. Images of other than 3 channels have luma alone."""
    luma = contrast * flip
    if x.shape[1] != 3:
        return x * luma[:, None, None, None] + (luma * brightness)[:, None, None, None]
    one = torch.eye(3, device=x.device, dtype=x.dtype)
    grey = torch.full_like(one, 1 / 3)  # of (1, 1, 1) / sqrt(3) and itself
    across = (one.roll(1, 0) - one.roll(-1, 0)) / math.sqrt(3)  # the cross product with it
    cosine, sine, colours = hue.cos(), hue.sin(), contrast * saturation
    parts = (luma, grey), (colours * cosine, one - grey), (colours * sine, across)
    matrix = torch.stack([factor[:, None, None] * part for factor, part in parts]).sum(0)
    usual = (brightness == 0) & (luma == 1) & (hue == 0) & (colours == 1)
    matrix = torch.where(usual[:, None, None], one, matrix)  # exactly
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # [N, H W, 3], a view in either layout
    offset = (luma * brightness)[:, None, None].expand(len(x), 1, 3)
    return torch.baddbmm(offset, rows, matrix.mT).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Ada:
    """The augmentation, and the probability `p` of each of its changes: a 0-dim tensor on the device, 0 at first.

    The discriminator is too sure of itself where its logits on the (augmented) training images are positive too often.
    So their mean sign over 4 batches is held at `target`: p grows while it is above, and falls while it is below, as
    fast as takes p from 0 to 1 in `images` images.

    batch: real images between two calls of `observe`.
    """

    def __init__(self, device: torch.device | str, *, batch: int, target: float = 0.6, images: float = 500_000.0):
        self._target, self._rise = target, batch * EVERY / images
        self.p = torch.zeros((), device=device)
        self._signs = torch.zeros((), device=device)  # summed over the batches since p changed
        self._batches = torch.zeros((), device=device)
        self._low_pass = torch.tensor(SYM6, dtype=torch.float64, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, C, H, W] images in about [-1, 1] -> the same shape and dtype. ValueError below 4 pixels a side."""
        if x.dim() != 4 or min(x.shape[2:]) < LEAST:
            raise ValueError(f"ada: images must be [N, C, H, W] of {LEAST} pixels a side or more, got {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            wide = (x if x.dtype == torch.float64 else x.float()).contiguous()
            for change in (self._blitted, self._transformed, self._recoloured):
                wide = change(wide)
            return dense(wide.to(x.dtype), is_channels_last(x))

    def _blitted(self, x: Tensor) -> Tensor:
        """Mirrored, turned by quarters, moved by whole pixels."""
        n, device = len(x), x.device
        mirrored, turned, moved = (self._drawn(x) for _ in range(3))
        flip = torch.where(mirrored, 1 - 2 * torch.randint(0, 2, (n,), device=device), 1).to(x.dtype)
        quarters = torch.where(turned, torch.randint(0, 4, (n,), device=device), 0) * (math.pi / 2)
        cosine, sine = quarters.cos().round().to(x.dtype), quarters.sin().round().to(x.dtype)
        sides = x.shape[3], x.shape[2]
        far = [((2 * torch.rand(n, device=device, dtype=x.dtype) - 1) * SHIFT * side).round() for side in sides]
        shift = torch.where(moved, far[0], 0), torch.where(moved, far[1], 0)
        changed = (flip != 1) | (cosine != 1) | (shift[0] != 0) | (shift[1] != 0)
        matrix = flip * cosine, -flip * sine, sine, cosine
        return x if _none(changed) else blit(x, matrix, shift)

    def _transformed(self, x: Tensor) -> Tensor:
        """Scaled, turned, stretched, turned again and moved."""
        turns = 1 - (1 - self.p).sqrt()  # of two turns at least one happens with probability p
        scaled, stretched, moved = (self._drawn(x) for _ in range(3))
        before, after = self._drawn(x, turns), self._drawn(x, turns)
        scale = torch.where(scaled, SCALE * _normal(x), 0)
        stretch = torch.where(stretched, SCALE * _normal(x), 0)
        first, last = (torch.where(turned, _angle(x), 0) for turned in (before, after))
        shift = [torch.where(moved, SHIFT * side * _normal(x), 0) for side in (x.shape[3], x.shape[2])]
        matrix = affine(scale, stretch, first, last)
        changed = scaled | stretched | moved | before | after
        if _none(changed):
            return x
        seen = transform(x, matrix, (shift[0], shift[1]), self._low_pass.to(x.dtype))
        return torch.where(changed[:, None, None, None], seen, x)

    def _recoloured(self, x: Tensor) -> Tensor:
        """Another brightness, contrast, sign of luma, hue and saturation."""
        drawn = [self._drawn(x) for _ in range(5)]
        sign = 1.0 - 2 * torch.randint(0, 2, (len(x),), device=x.device).to(x.dtype)
        contrast, saturation = (CONTRAST * _normal(x)).exp2(), (SATURATION * _normal(x)).exp2()
        values = BRIGHTNESS * _normal(x), contrast, sign, _angle(x), saturation
        usual = 0, 1, 1, 0, 1
        chosen = [torch.where(a, b, c) for a, b, c in zip(drawn, values, usual, strict=True)]
        return x if _none(torch.stack(drawn)) else recolour(x, *chosen)

    def _drawn(self, x: Tensor, p: Tensor | None = None) -> Tensor:
        """bool [N]: which images are changed, each with probability p."""
        return torch.rand(len(x), device=x.device) < (self.p if p is None else p)

    @torch.no_grad()
    def observe(self, logits_real: Tensor | Sequence[Tensor]) -> Tensor:
        """Follow the logits of a batch of real images, as the discriminator saw them; returns p after it."""
        scales = [logits_real] if isinstance(logits_real, Tensor) else logits_real
        self._signs += torch.stack([scale.float().sign().mean() for scale in scales]).mean()
        self._batches += 1
        due = self._batches >= EVERY
        change = (self._signs / self._batches - self._target).sign() * self._rise
        self.p.copy_(torch.where(due, (self.p + change).clamp(0, 1), self.p))
        self._signs *= ~due
        self._batches *= ~due
        return self.p.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """What the next images and the next change of p depend on."""
        return {"p": self.p, "signs": self._signs, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for own, saved in ((self.p, state["p"]), (self._signs, state["signs"]), (self._batches, state["batches"])):
            own.copy_(saved)


def affine(scale: Tensor, stretch: Tensor, first: Tensor, last: Tensor) -> Matrix:
    """Where a pixel comes from that was scaled by 2^-scale, turned, stretched by 2^-stretch in x as much as shrunk in
    y, and turned again; [N] each, angles in radians."""
    wide, high = (scale + stretch).exp2(), (scale - stretch).exp2()
    c1, s1, c2, s2 = first.cos(), first.sin(), last.cos(), last.sin()
    a, b = c1 * wide * c2 - s1 * high * s2, -c1 * wide * s2 - s1 * high * c2
    c, d = s1 * wide * c2 + c1 * high * s2, -s1 * wide * s2 + c1 * high * c2
    return a, b, c, d


def _normal(x: Tensor) -> Tensor:
    return torch.randn(len(x), device=x.device, dtype=x.dtype)


def _angle(x: Tensor) -> Tensor:
    """An angle for each row of x, uniform on the circle."""
    return (2 * torch.rand(len(x), device=x.device, dtype=x.dtype) - 1) * math.pi


def _none(changed: Tensor) -> bool:
    """Whether no image of the batch is changed. Always False on a GPU, where the answer would cost a wait."""
    return changed.device.type == "cpu" and not bool(changed.any())
