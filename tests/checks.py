"""The comparisons that the op and module tests share: ours against plain PyTorch in float64, to second order.

An error is judged against what PyTorch itself makes in the same dtype: at most four times that, plus a few roundings.
"""

import math

import torch

import fastgan
from fastgan.choice import missing

BACKENDS = [name for name in ("reference", "native") if not missing(name)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def distance(got, want):
    """Relative error in the 2-norm."""
    assert got.shape == want.shape, (got.shape, want.shape)
    scale = want.double().norm().clamp_min(1e-12 * max(want.numel(), 1) ** 0.5)
    return ((got.double() - want.double()).norm() / scale).item()


def assert_close(got, want, dtype, torch_error=0.0, what=""):
    # in float64 the oracle rounds as much as we do, and second derivatives cancel: 5e-15 was seen on one logit
    torch_error = 0.0 if math.isnan(torch_error) else torch_error  # where PyTorch's own is no number it allows nothing
    limit = 4 * torch_error + (500 if dtype == torch.float64 else 16) * torch.finfo(dtype).eps
    error = distance(got, want)
    assert error <= limit, f"{what}: relative error {error:.3g}, allowed {limit:.3g} ({dtype})"


def orders(function, inputs, order=2, seed=1234):
    """[outputs, first derivatives, second derivatives] of function(*inputs) along fixed random cotangents."""
    rng = torch.Generator().manual_seed(seed)

    def cotangent(t):
        return torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t)

    leaves = [t for t in inputs if t is not None and t.requires_grad]
    y = function(*inputs)
    results = [y.detach()]
    if order == 0:
        return results
    dy = cotangent(y).requires_grad_(order > 1)
    first = torch.autograd.grad(y, leaves, dy, create_graph=order > 1)
    results += [g.detach() for g in first]
    if order > 1:
        total = sum((g.double() * cotangent(g).double()).sum() for g in first)
        second = torch.autograd.grad(total, [*leaves, dy], allow_unused=True)
        results += [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(second, [*leaves, dy], strict=True)]
    return results


def leaves(inputs, dtype, layout):
    """Copies of float64 inputs in a dtype and layout, requiring gradients."""

    def leaf(t):
        t = t.detach().to(dtype)
        t = t.contiguous(memory_format=layout) if t.dim() == 4 else t
        return t.requires_grad_(True)

    return [None if t is None else leaf(t) for t in inputs]


def clear_of(value, x, margin=0.02):
    """x, moved where |value(x)| <= margin: where a 16-bit rounding could step over a kink or a clamp."""
    for _ in range(50):
        near = value(x).abs() <= margin
        if not near.any():
            return x
        x = torch.where(near, x + 0.1, x)
    raise AssertionError(f"clear_of: x must come clear of the margin {margin}, got {int(near.sum())} that do not")


def against_plain(ours, plain, inputs, dtype, layout, backend, order=2):
    """ours(*inputs) on a backend equals plain(*inputs), outputs and derivatives, to what PyTorch's dtype allows."""
    rounded = [None if t is None else t.to(dtype).double() for t in inputs]
    want = orders(plain, leaves(rounded, torch.float64, torch.contiguous_format), order)
    theirs = orders(plain, leaves(rounded, dtype, layout), order)
    with fastgan.backend(backend):
        got = orders(ours, leaves(rounded, dtype, layout), order)
    assert len(got) == len(want)
    for i, (g, w, t) in enumerate(zip(got, want, theirs, strict=True)):
        assert g.dtype == dtype
        assert_close(g, w, dtype, distance(t, w), f"result {i} on {backend}")
    return got
