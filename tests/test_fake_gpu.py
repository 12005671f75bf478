"""The GPU route without a GPU: every op and the step on a fake device (tests/emulation/fake_gpu.py)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration

from fastgan._op import OPS

PROGRAM = Path(__file__).parent / "emulation" / "fake_gpu.py"
needs_backend = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no Python device backends (2.6 has none), which the fake GPU is made of",
)
# what the recorder must say of each violation planted into a discriminator or a schedule
CAUGHT = {
    "item": "reads a value back to the host",
    "branch": "reads a value back to the host",
    "cpu": "copies (6,) to the CPU",
    "host": "copies (3,) from the host",
    "counter": "aten.mul.Tensor takes 4 in one step and 7 in the next",
    "replaced": "it was replaced, not changed in place",
    "lr": "aten._fused_adam_.default takes",
}


def results(check):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), check], capture_output=True, text=True, timeout=600, cwd=PROGRAM.parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)


@needs_backend
@pytest.mark.parametrize("check", ["ops", "compile", "autocast"])
def test_every_op(check):
    found = results(check)
    wanted = [n for n in OPS if check != "compile" or not n.endswith("_double_backward")]
    assert found == dict.fromkeys(wanted, "ok")


@needs_backend
def test_the_step_can_be_captured():
    found = results("step")
    assert len(found) >= 16 and set(found.values()) == {"ok"}, found


@needs_backend
def test_planted_violations_are_caught():
    found = results("seeded")
    assert found.keys() == CAUGHT.keys()
    for name, words in CAUGHT.items():
        assert words in found[name], (name, found[name])
