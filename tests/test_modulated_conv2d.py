"""modulated_conv2d and conv2d_resample against their definitions in float64 PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, LAYOUTS, against_plain
from test_upfirdn2d import ODD, SMOOTH, plain

from fastgan import functional

FILTER = torch.outer(SMOOTH, SMOOTH)


def upfirdn(x, f, up, down, padding, flip=False, gain=1.0):
    return plain(f, up, down, padding, flip, gain)(x)


def resampled(x, w, f, up, down, padding, groups, flip_weight, flip_filter):
    """The definition: upsample by f, convolve, downsample by f."""
    kh, kw = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    p = [padding] * 4
    if up > 1:
        more = (kw + up - 1) // 2, (kw - up) // 2, (kh + up - 1) // 2, (kh - up) // 2
        p = [a + b for a, b in zip(p, more, strict=True)]
    if down > 1:
        more = (kw - down + 1) // 2, (kw - down) // 2, (kh - down + 1) // 2, (kh - down) // 2
        p = [a + b for a, b in zip(p, more, strict=True)]
    x = upfirdn(x, f if up > 1 else None, up, 1, tuple(p), flip_filter, up**2)
    x = F.conv2d(x, w if flip_weight else w.flip([2, 3]), groups=groups)
    return upfirdn(x, f, 1, down, 0, flip_filter) if down > 1 else x


RESAMPLED = [  # up, down, padding, groups, kernel size
    (1, 1, 1, 1, 3),
    (2, 1, 1, 1, 3),
    (1, 2, 1, 2, 3),
    (2, 1, 0, 1, 1),
    (1, 2, 0, 1, 1),
    (2, 2, 1, 2, 3),
    (2, 1, 3, 2, 2),
    (3, 1, 1, 1, 4),
    (1, 1, -1, 1, 3),
    (2, 1, -3, 1, 3),
]


@pytest.mark.parametrize("flips", [(True, False), (False, True)], ids=["correlation", "convolution"])
@pytest.mark.parametrize("f", [FILTER, ODD, None], ids=["4x4", "odd", "none"])
@pytest.mark.parametrize(("up", "down", "padding", "groups", "size"), RESAMPLED)
def test_conv2d_resample_is_its_definition(up, down, padding, groups, size, f, flips):
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    w = torch.randn(6, 4 // groups, size, size, dtype=torch.float64)
    y = functional.conv2d_resample(x, w, f, up, down, padding, groups, *flips)
    torch.testing.assert_close(y, resampled(x, w, f, up, down, padding, groups, *flips))


def modulated(x, w, s, noise, up, down, padding, f, demodulate):
    """Each sample by itself, with its own weight."""
    rows = []
    for n in range(len(x)):
        own = w * s[n][None, :, None, None]
        own = own / (own.square().sum([1, 2, 3], keepdim=True) + 1e-8).sqrt() if demodulate else own
        rows.append(resampled(x[n : n + 1], own, f, up, down, padding, 1, True, False))
    return torch.cat(rows) + noise


MODULATED = [(1, 1, 1, None, True), (2, 1, 1, FILTER, True), (1, 2, 1, FILTER, False)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["activations", "weights", "auto"])
@pytest.mark.parametrize(("up", "down", "padding", "f", "demodulate"), MODULATED, ids=["same", "up", "down"])
def test_modulated_conv2d_to_second_order(up, down, padding, f, demodulate, form, dtype, backend):
    shapes = (3, 4, 6, 5), (7, 4, 3, 3), (3, 4), (1, 1, 6 * up // down, 5 * up // down)
    x, w, s, noise = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    noise = noise[..., :1] if down > 1 else noise
    ours = lambda x, w, s, noise: functional.modulated_conv2d(
        x, w, s, noise=noise, up=up, down=down, padding=padding, resample_filter=f, demodulate=demodulate, form=form
    )
    plainly = lambda x, w, s, noise: modulated(x, w, s, noise, up, down, padding, f, demodulate)
    against_plain(ours, plainly, (x, w, s, noise), dtype, LAYOUTS[0], backend)


def test_modulated_conv2d_in_half_precision_does_not_overflow():
    """Squares of 300 do not fit into float16; the filters' lengths are taken out anyway."""
    x, w, s = torch.randn(2, 8, 4, 4), torch.randn(8, 8, 3, 3) * 300, torch.randn(2, 8) * 300
    want = functional.modulated_conv2d(x, w, s, padding=1)
    for form in ("activations", "weights"):
        y = functional.modulated_conv2d(x.half(), w.half(), s.half(), padding=1, form=form)
        assert y.dtype == torch.float16
        torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.02)


def test_errors():
    x, w = torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3)
    modulate, resample = functional.modulated_conv2d, functional.conv2d_resample
    for call, text in [
        (lambda: modulate(x, w, torch.ones(4)), r"modulated_conv2d: weight must be \[K, C, R, S\] and styles \[N, C\]"),
        (lambda: modulate(x, w, torch.ones(2, 4), form="both"), "form must be one of auto, activations, weights, got"),
        (lambda: resample(x, w[0]), r"conv2d_resample: weight must have 4 dimensions, got shape \(4, 3, 3\)"),
        (lambda: resample(x, w, up=0), "conv2d_resample: up must be an int >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()


def test_the_form_follows_the_bytes_of_a_single_sample():
    from fastgan.functional.modulation import _weights_are_cheaper

    weight = torch.empty(64, 64, 3, 3)
    assert _weights_are_cheaper(torch.empty(1, 64, 128, 128), weight, 1, 1)
    assert not _weights_are_cheaper(torch.empty(1, 64, 8, 8), weight, 2, 1)
    assert not _weights_are_cheaper(torch.empty(8, 64, 128, 128), weight, 1, 1)
