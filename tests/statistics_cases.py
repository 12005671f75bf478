"""The convolutions with batch statistics that both GPU emulators run: cases, and their arguments."""

import torch

# what it is: (op, x, weight, bias?, the geometry as the op takes it); no statistic group fills its last tile
CASES = {
    "k4s2p1": ("conv2d", (4, 3, 8, 8), (20, 3, 4, 4), True, [2, 2], [1, 1], [1, 1], 1),
    "asymmetric, groups": ("conv2d", (4, 4, 9, 6), (6, 2, 3, 2), False, [2, 1], [0, 1], [1, 1], 2),
    "depthwise, dilated": ("conv2d", (4, 4, 7, 7), (4, 1, 3, 3), True, [1, 1], [2, 2], [2, 2], 4),
    "one pixel a sample": ("conv2d", (8, 18, 3, 3), (5, 18, 3, 3), True, [1, 1], [0, 0], [1, 1], 1),
    "k4s2p1, by phase": ("conv_transpose2d", (4, 3, 4, 5), (3, 18, 4, 4), True, [2, 2], [1, 1], [0, 0], 1, [1, 1]),
    "phases of unequal size": ("conv_transpose2d", (4, 4, 3, 4), (4, 5, 3, 2), True, [2, 3], [1, 0], [0, 1], 2, [1, 1]),
    "phases without taps": ("conv_transpose2d", (4, 3, 3, 3), (3, 5, 2, 2), True, [3, 3], [0, 0], [2, 0], 1, [1, 1]),
    "tiles without pixels": ("conv_transpose2d", (4, 3, 2, 40), (3, 5, 1, 1), True, [2, 2], [0, 0], [0, 0], 1, [1, 1]),
    "1x1 to 4x4": ("conv_transpose2d", (4, 7, 1, 1), (7, 5, 4, 4), True, [1, 1], [0, 0], [0, 0], 1, [1, 1]),
}


def arguments(case, dtype=torch.float32, layout=torch.channels_last, mean=3.0):
    _, x, weight, bias, *geometry = case
    x = (torch.randn(x) + mean).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(weight).to(dtype).contiguous(memory_format=layout)
    return x, weight, torch.randn(channels_of(case)).to(dtype) if bias else None, *geometry


def channels_of(case):
    op, _, weight, _, *geometry = case
    return weight[0] if op == "conv2d" else weight[1] * geometry[3]
