"""What the tests of emulated kernels share."""

import pytest

from fastgan import testing


@pytest.fixture
def record():
    """The CUDA C++ kernels on the CPU, and what is launched there."""
    try:
        with testing.emulate("cuda") as record:
            yield record
    except RuntimeError as error:
        if "the CUDA emulator needs" not in str(error):
            raise
        pytest.skip(str(error))
