"""Every test: fixed seed, two threads, a private cache, freshly raced backends."""

import os
import tempfile

os.environ["FASTGAN_CACHE"] = tempfile.mkdtemp(prefix="fastgan-test-")
os.environ.pop("FASTGAN_BACKEND", None)

import pytest
import torch

import fastgan


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    fastgan.backend("auto")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible to torch on this machine"))
