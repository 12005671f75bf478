"""Ranks equal one process with their images, over 20 steps, to rounding: with statistics over all of them, and with
each rank's own.

`make test` takes every loss and every penalty once on two ranks; `make slow` all of their pairs, on four ranks too.
"""

from __future__ import annotations

import fcntl
import functools
import os
from itertools import product

import pytest
import torch
from exact_ranks import ALL_PAIRS, DEVIATION, PAIRS, STATISTICS, alone
from processes import launch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
ROUNDED = ("bce:r1", "relativistic-average:wgan-gp")  # in float32 and bf16 too
SHORT = [
    *(f"{pair}:{statistics}:float64" for pair, statistics in product(PAIRS, STATISTICS)),
    *(":".join(of) for of in product(ROUNDED, STATISTICS, ("float32", "bf16"))),
    *(f"{DEVIATION[1]}:all:{dtype}" for dtype in ("float32", "bf16")),
]


def run(folder, ranks, cases):
    """What each rank found; all must have the same parameters, bit for bit, and running statistics of all ranks."""
    launch("exact_ranks.py", ranks, str(folder), *cases, seconds=1500)
    first, *others = (torch.load(folder / f"rank-{k}.pt", weights_only=True) for k in range(ranks))
    for case in cases:
        for other in others:
            assert torch.equal(first[case]["weights"], other[case]["weights"]), case
            assert torch.equal(first[case]["buffers"], other[case]["buffers"]) == (":all:" in case), case
    return first


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Once for all of pytest's processes, each of which would take the 20 to 70 s of its own."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "two-ranks"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "checked").exists():
            run(folder, 2, SHORT)
            (folder / "checked").touch()
    return torch.load(folder / "rank-0.pt", weights_only=True)


one_process = functools.cache(alone)
# Orders of the samples, and how many times their greatest error is allowed: a further draw of the rounding passes that
# with a chance of 0.3 % where a single direction carries all of it, which is the worst case. A part of a batch of 12 on
# four ranks has no more than six orders.
ORDERS = {"float64": (2, 15), "float32": (6, 3), "bf16": (6, 3)}


def check(case, ranks, ours):
    """Beside what one process makes in that dtype at several orders of its sums, against the first order in float64.

    Wrong statistics make 1e-2. In float64 the rounding stays below 1e-8 besides.
    """
    *pair, dtype = case.split(":")
    whole = one_process(":".join([*pair, "float64" if dtype == "float64" else "smooth"]), ranks)
    exact = whole["weights"]
    assert (exact[1:] != exact[:-1]).any(1).all()
    orders, times = ORDERS[dtype]
    first = int(dtype == "float64")  # whose order 0 is the exact one itself
    usual = max(away(one_process(case, ranks, k)["weights"], exact) for k in range(first, first + orders))
    assert usual > 0 and away(ours["weights"], exact) <= times * usual, (away(ours["weights"], exact), usual)
    if dtype == "float64":
        assert usual < 1e-8, usual
        if "buffers" in whole:
            torch.testing.assert_close(ours["buffers"], whole["buffers"], rtol=1e-9, atol=1e-10)


def away(weights, exact):
    return float((weights.double() - exact).norm())


@pytest.mark.parametrize("case", SHORT)
def test_two_ranks_equal_one_process(two_ranks, case):
    check(case, 2, two_ranks[case])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bf16"])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_every_loss_with_every_penalty(tmp_path, ranks, dtype, statistics):
    failed = {}
    for case, ours in run(tmp_path, ranks, [f"{pair}:{statistics}:{dtype}" for pair in ALL_PAIRS]).items():
        try:
            check(case, ranks, ours)
        except AssertionError as error:
            failed[case] = str(error)
    assert not failed, failed
