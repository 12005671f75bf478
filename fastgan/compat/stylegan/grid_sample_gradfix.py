"""`grid_sample` whose gradient with respect to the image is differentiable once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["grid_sample"]

enabled = True  # StyleGAN's training loops set it; there is no other path here

BILINEAR, ZEROS, ALIGN_CORNERS = 0, 0, False


def grid_sample(input: Tensor, grid: Tensor) -> Tensor:
    """`torch.nn.functional.grid_sample`: bilinear, zeros outside, corners not aligned.

    Args:
        input: [N, C, H, W], floating.
        grid: [N, OH, OW, 2], of the same dtype.

    Returns:
        [N, C, OH, OW]. Linear in input: its derivatives are exact to every order. Of the grid the first derivative is.

    Raises:
        NotImplementedError: a second derivative in which the grid's gradient takes part.
    """
    y: Tensor = _Sample.apply(input, grid)
    return y


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(input, grid)
        return torch.grid_sampler_2d(input, grid, BILINEAR, ZEROS, ALIGN_CORNERS)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input, grid = ctx.saved_tensors
        dinput, dgrid = _Gradient.apply(dy, input, grid, *ctx.needs_input_grad)
        return (dinput if ctx.needs_input_grad[0] else None, dgrid if ctx.needs_input_grad[1] else None)


class _Gradient(torch.autograd.Function):
    """dinput is linear in dy, and its adjoint is the sampling itself."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, input: Tensor, grid: Tensor, *wanted: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grid)
        ctx.set_materialize_grads(False)
        mask = list(wanted)
        dinput, dgrid = torch.ops.aten.grid_sampler_2d_backward(dy, input, grid, BILINEAR, ZEROS, ALIGN_CORNERS, mask)
        return dinput, dgrid

    @staticmethod
    def backward(ctx: Any, d_dinput: Tensor | None, d_dgrid: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_dgrid is not None or ctx.needs_input_grad[2]:
            raise NotImplementedError(
                "grid_sample: a second derivative must be of the image's gradient for the image, got one of the "
                "grid; detach the grid"
            )
        (grid,) = ctx.saved_tensors
        d_dy = None if d_dinput is None or not ctx.needs_input_grad[0] else _Sample.apply(d_dinput, grid)
        return d_dy, None, None, None, None
