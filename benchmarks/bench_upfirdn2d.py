"""upfirdn2d: StyleGAN2's up- and downsampling and blur, and StyleGAN3's 12 taps, batch 16."""

import pytest
import resampling
import torch
from layers import DOUBLE, ROWS, noise, rows

from fastgan import functional
from fastgan.benchmarking.comparison import Case
from fastgan.ops import upfirdn2d

SQUARE = torch.outer(resampling.SHORT, resampling.SHORT)
FORMS = {  # f, up, down, padding
    "up2": (SQUARE, 2, 1, (2, 1, 2, 1)),
    "down2": (SQUARE, 1, 2, (1, 1, 1, 1)),
    "blur": (SQUARE, 1, 1, (2, 1, 2, 1)),
    "up2-12taps": (resampling.LONG, 2, 1, (6, 5, 6, 5)),
    "down2-12taps": (resampling.LONG, 1, 2, (5, 5, 5, 5)),
}
BATCH = 16
SHAPES = {f"{c}x{s}x{s}-{form}": (c, s, form) for c, s in ((64, 32), (32, 64)) for form in FORMS}
DIRECTIONS = ("forward", "forward+backward", DOUBLE)
CASES = [Case("upfirdn2d", shape, direction, "float32") for shape in SHAPES for direction in DIRECTIONS]


def runners(case):
    channels, size, form = SHAPES[case.shape]
    f, up, down, padding = FORMS[form]
    x = noise(BATCH, channels, size, size, dtype=case.torch_dtype)
    work = [upfirdn2d.cost(x, f, (up, up), (down, down), padding)] * (1 if case.direction == "forward" else 2)
    plain = lambda x: resampling.upfirdn2d(x, f, up, down, padding)
    return rows(plain, lambda x: functional.upfirdn2d(x, f, up, down, padding), [x], case, work)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_upfirdn2d(case, row, compare):
    compare(case, row, runners)
