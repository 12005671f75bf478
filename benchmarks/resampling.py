"""StyleGAN's ops in plain PyTorch, as the projects compute them where their CUDA extensions are not built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8  # StyleGAN2's filter
LONG = torch.hann_window(14, periodic=False)[1:-1] / 6.5  # 12 taps, as StyleGAN3's


def upfirdn2d(x: Tensor, f: Tensor, up: int, down: int, padding: Sequence[int], gain: float = 1.0) -> Tensor:
    """Zeros written out, padded, one depthwise convolution (two for a [K]), strided by slicing."""
    n, c, h, w = x.shape
    u = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    u = F.pad(u, tuple(padding))
    f = (f * gain ** (f.dim() / 2)).flip(list(range(f.dim()))).to(x.dtype)
    if f.dim() == 2:
        u = F.conv2d(u, f.expand(c, 1, *f.shape), groups=c)
    else:
        u = F.conv2d(u, f[None].expand(c, 1, 1, -1), groups=c)
        u = F.conv2d(u, f[:, None].expand(c, 1, -1, 1), groups=c)
    return u[:, :, ::down, ::down]


def filtered_lrelu(x: Tensor, f: Tensor, bias: Tensor, up: int, down: int, padding: Sequence[int]) -> Tensor:
    x = upfirdn2d(x + bias.view(1, -1, 1, 1), f, up, 1, padding, up**2)
    x = (F.leaky_relu(x, 0.2) * 2**0.5).clamp(-256, 256)
    return upfirdn2d(x, f, 1, down, (0, 0, 0, 0))


def modulated_conv2d(x: Tensor, weight: Tensor, styles: Tensor) -> Tensor:
    """Each sample's own weight, as a grouped convolution: the fused form of the projects."""
    n, c, h, w = x.shape
    own = weight[None] * styles[:, None, :, None, None]
    own = own * (own.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    y = F.conv2d(x.reshape(1, n * c, h, w), own.flatten(0, 1), padding=1, groups=n)
    return y.reshape(n, -1, h, w)


def modulated_conv2d_shared(x: Tensor, weight: Tensor, styles: Tensor) -> Tensor:
    """One convolution with scaled activations, the projects' training form; own weights give the lengths."""
    own = weight[None] * styles[:, None, :, None, None]
    length = (own.square().sum([2, 3, 4]) + 1e-8).rsqrt()
    return F.conv2d(x * styles[:, :, None, None], weight, padding=1) * length[:, :, None, None]
