"""modulated_conv2d and filtered_lrelu: layers of StyleGAN2 and StyleGAN3 at batch 8."""

import pytest
import resampling
from layers import DOUBLE, ROWS, SECOND, noise, rows

from fastgan import functional
from fastgan.benchmarking.comparison import Case
from fastgan.ops import filtered_lrelu

BATCH = 8
MODULATED = {"128x8x8": (128, 8), "64x32x32": (64, 32), "32x64x64": (32, 64)}
FILTERED = {"64x36x36": (64, 36), "32x68x68": (32, 68)}
PADDING = (11, 10, 11, 10)
DIRECTIONS = ("forward", "forward+backward", SECOND)
CONVOLUTIONS = dict(zip(DIRECTIONS, (1, 3, 4), strict=True))  # dx and dw; of the second order, dw and y of ddx
# Of filtered_lrelu the second order is the cotangent's alone: x enters the gradient only by signs.
PASSES = {"forward": 1, "forward+backward": 2, DOUBLE: 1}
CASES = [Case("modulated_conv2d", shape, direction, "float32") for shape in MODULATED for direction in DIRECTIONS]
CASES += [Case("filtered_lrelu", shape, direction, "float32") for shape in FILTERED for direction in PASSES]


def runners(case):
    if case.op == "modulated_conv2d":
        channels, size = MODULATED[case.shape]
        x, styles = noise(BATCH, channels, size, size), noise(BATCH, channels)
        weight = noise(channels, channels, 3, 3, scale=0.02)
        ours = lambda x, w, s: functional.modulated_conv2d(x, w, s, padding=1)
        work = [{"bytes": 8 * x.numel(), "flops": 18 * channels * x.numel()}] * CONVOLUTIONS[case.direction]
        return rows(resampling.modulated_conv2d, ours, [x, weight, styles], case, work)
    channels, size = FILTERED[case.shape]
    f, x, bias = resampling.LONG, noise(BATCH, channels, size, size), noise(channels)
    ours = lambda x, b: functional.filtered_lrelu(x, f, f, b, 2, 2, PADDING, clamp=256)
    plain = lambda x, b: resampling.filtered_lrelu(x, f, b, 2, 2, PADDING)
    work = [filtered_lrelu.cost(x, f, f, 2, 2, [11, 10, 11, 10], 256.0)] * PASSES[case.direction]
    return rows(plain, ours, [x, bias], case, work)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_modulated_conv2d(case, row, compare):
    compare(case, row, runners)
