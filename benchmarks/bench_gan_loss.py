"""gan_loss: the discriminator's loss on one logit a sample (64) and on a map of patches (64 x 30 x 30).

PyTorch's rows are the tutorial's criterion against tensors of targets, and the same value by softplus without targets.
fastgan's kernel also computes the six statistics that people log, in the same pass.
"""

import pytest
import torch
import torch.nn.functional as F
from layers import BATCH, DIRECTIONS, DTYPES, forced, noise

import fastgan
from fastgan.benchmarking.comparison import Case, Runner
from fastgan.benchmarking.textbook import compiled
from fastgan.ops import gan_loss

ROWS = ("eager", "eager-tuned", "compile", "fastgan", "fastgan-native")
SHAPES = {"bce-64": (BATCH,), "bce-64x1x30x30": (BATCH, 1, 30, 30)}
CASES = [Case("gan_loss", shape, direction, dtype) for shape in SHAPES for direction in DIRECTIONS for dtype in DTYPES]


def runners(case):
    torch._dynamo.reset()
    fake, real = (noise(*SHAPES[case.shape], dtype=case.torch_dtype).requires_grad_() for _ in range(2))
    zeros, ones = torch.zeros_like(fake), torch.ones_like(real)

    def criterion(fake, real):
        return F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)

    def tuned(fake, real):
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def ours(fake, real):
        return fastgan.functional.gan_loss(fake, real, kind="bce", side="d")

    def run(f):
        if case.direction == "forward":
            return lambda: f(fake, real)
        return lambda: torch.autograd.grad(f(fake, real), (fake, real))

    n = fake.numel() + real.numel()
    work = [gan_loss.cost(fake, real)]
    if case.direction != "forward":  # the card: each logit is read, its gradient written
        work += [{"bytes": 2 * n * fake.element_size(), "flops": 10 * n}]
    return {
        "eager": Runner(run(criterion), work, case.dtype),
        "eager-tuned": Runner(run(tuned), work, case.dtype),
        "compile": Runner(run(compiled(tuned)), work, case.dtype),
        "fastgan": Runner(run(ours), work, case.dtype, ours=True),
        "fastgan-native": Runner(forced(run(ours)), work, case.dtype, ours=True),
    }


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gan_loss(case, row, compare):
    compare(case, row, runners)
