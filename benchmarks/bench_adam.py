"""adam: one update of all parameters of DCGAN-64's generator, alone and with its moving average."""

import pytest
import torch
from torch import nn

import fastgan
from fastgan.benchmarking.comparison import Case, Runner
from fastgan.ops import adam

LAYOUTS = {"dcgan-64": torch.channels_last, "dcgan-64-nchw": torch.contiguous_format}
CASES = [Case("adam", shape, averages, "float32") for shape in LAYOUTS for averages in ("alone", "average")]
ROWS = ("foreach", "fused", "fastgan")
DECAY = 0.999


def runners(case):
    averaging = case.direction == "average"

    def row(make, ours=False):
        torch.manual_seed(0)
        g, _ = fastgan.models.build("dcgan-64")
        g = g.to(memory_format=LAYOUTS[case.shape])
        parameters = [nn.Parameter(p.detach().clone()) for p in g.parameters()]
        averages = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer = make(parameters)

        def textbook():
            optimizer.step()
            if averaging:
                torch._foreach_lerp_(averages, parameters, 1 - DECAY)

        def fused():
            optimizer.step(averages=dict(zip(parameters, averages, strict=True)), weight=1 - DECAY)

        run = fused if ours and averaging else textbook
        return Runner(torch.no_grad()(run), [adam.cost(parameters, averages if averaging else [])], ours=ours)

    return {
        "foreach": row(lambda p: torch.optim.Adam(p, 2e-4, (0.5, 0.999), foreach=True)),
        "fused": row(lambda p: torch.optim.Adam(p, 2e-4, (0.5, 0.999), fused=True)),
        "fastgan": row(lambda p: fastgan.Adam(p, 2e-4, (0.5, 0.999)), ours=True),
    }


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adam(case, row, compare):
    compare(case, row, runners)
