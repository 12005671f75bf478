"""Every test: fixed seed, one thread, freshly raced backends; every process: a cache of its own.

One thread, so that the processes of `pytest --numprocesses auto` fill the cores and no more; a test for several asks
for them by its own call, or by @pytest.mark.threads(n).
"""

import atexit
import os
import shutil
import tempfile

os.environ["FASTGAN_CACHE"] = tempfile.mkdtemp(prefix="fastgan-test-")
os.environ.pop("FASTGAN_BACKEND", None)
# Threads that wait for each other sleep: spinning, they would take the core that the other process computes on.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import fastgan
from fastgan.choice import native

atexit.register(shutil.rmtree, os.environ["FASTGAN_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _fresh(request):
    torch.manual_seed(0)
    threads = request.node.get_closest_marker("threads")
    torch.set_num_threads(threads.args[0] if threads else 1)
    yield
    fastgan.backend("auto")


def pytest_addoption(parser):
    parser.addoption("--kernels", metavar="TABLE", help="hold our kernels to one instruction set, such as avx2")


def pytest_configure(config):
    table = config.getoption("--kernels")
    if table:
        module, reason = native()
        refusal = reason if module is None else module.tables().get(table, "this build has no such table")
        if not refusal and module.table() == table:
            refusal = "it is this CPU's own, which every test runs anyway"
        if refusal:
            pytest.exit(f"--kernels {table}: nothing is tested: {refusal}", 0)
        module.use_table(table)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords have the names of folders too: of a checkout that lies in "gpu"
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible to torch on this machine"))


@pytest.fixture
def unraced():
    """No race chooses a kernel: two runs that begin apart also race apart, and a loaded machine decides otherwise."""
    with fastgan.racing(False):
        yield


@pytest.fixture
def free():
    """Neither a backend forced nor races forbidden: what a user's call sees."""
    with fastgan.backend("auto"), fastgan.racing(True):
        yield
