"""Ranks with statistics over all of them equal one process with their images, over 20 steps, to rounding.

`make test` takes every loss and every penalty once on two ranks; `make slow` all of their pairs, on four ranks too.
"""

from __future__ import annotations

import functools

import pytest
import torch
from exact_ranks import ALL_PAIRS, DTYPES, PAIRS, train
from processes import launch

from fastgan.training.distributed import World

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
ROUNDED = ("bce:r1", "relativistic-average:wgan-gp")  # in float32 and bf16 too
SHORT = [f"{pair}:float64" for pair in PAIRS] + [f"{p}:{dtype}" for p in ROUNDED for dtype in ("float32", "bf16")]


def run(folder, ranks, cases):
    """What each rank found; all must have the same parameters, bit for bit, and the same running statistics."""
    launch("exact_ranks.py", ranks, str(folder), *cases, seconds=1500)
    first, *others = (torch.load(folder / f"rank-{k}.pt", weights_only=True) for k in range(ranks))
    for case in cases:
        for other in others:
            for name, numbers in first[case].items():
                assert torch.equal(numbers, other[case][name]), (case, name)
    return first


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, SHORT)


@functools.cache
def alone(case, turned=False):
    return train(case, World(), turned)


def check(case, ours):
    """float64 to 1e-9; other dtypes beside what one process makes in them at two orders of its sums, against float64.

    One order is a single draw of the rounding: it happened to be 4.4e-5 where two ranks made 1.0e-4.
    """
    pair, _, dtype = case.rpartition(":")
    exact = alone(f"{pair}:float64")
    assert (exact["weights"][1:] != exact["weights"][:-1]).any(1).all()
    if dtype == "float64":
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)
        return
    error, *usual = (
        float((w["weights"].double() - exact["weights"]).norm()) for w in (ours, alone(case), alone(case, turned=True))
    )
    assert 0 < error <= 2 * max(usual), (error, usual)


@pytest.mark.parametrize("case", SHORT)
def test_two_ranks_equal_one_process(two_ranks, case):
    check(case, two_ranks[case])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_loss_with_every_penalty(tmp_path, ranks, dtype):
    cases = [f"{pair}:{dtype}" for pair in ALL_PAIRS]
    for case, ours in run(tmp_path, ranks, cases).items():
        check(case, ours)
