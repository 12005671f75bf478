"""Every call that writes is interrupted once; after each the run goes on to the same bits.

`make faults` harms each call; `make test` a few of them. The harm is done by a library in front of the C library's
open, write, fsync, rename, unlink, mkdir and truncate (shim.c), so whoever writes is covered: Python, torch, Pillow.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgan.training import checkpoint
from fastgan.training.rundir import RunDirectory

HERE = Path(__file__).parent
SMALL = [
    *("--recipe=dcgan-28", "--backend=reference", "--device=cpu", "--batch-size=4", "--quiet", "--data=emoji-64"),
    *("--set=image_size=8", "--set=latent=5", "--set=model_options.g_width=2", "--set=model_options.d_width=2"),
    *("--set=sample_count=4", "--set=log_every=1", "--set=checkpoint_every=1", "--set=sample_every=0"),
]


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("the calls are harmed by an LD_PRELOAD library, which needs Linux and cc")
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", path, HERE / "shim.c", "-ldl"], check=True)
    return path


def harm(shim, folder, how, many, which=0):
    env = os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, HERE / "driver.py", folder, how, str(many), str(which)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *wrong, last = map(json.loads, done.stdout.splitlines())
    assert not wrong, "\n".join(map(str, wrong[:5]))
    return last


@pytest.mark.slow
@pytest.mark.parametrize("how", ["die", "torn", "full"])
def test_every_call(shim, tmp_path, how):
    last = harm(shim, tmp_path, how, 1)
    assert last["trials"] == last["calls"] > 50


@pytest.mark.parametrize("how", ["die", "torn", "full"])
def test_some_calls(shim, tmp_path, how):
    """Another set of calls each day."""
    assert harm(shim, tmp_path, how, 17, random.Random(time.strftime("%j") + how).randrange(17))["trials"] >= 3


@pytest.mark.parametrize("trials", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_after_any_number_of_bytes(shim, tmp_path, trials):
    """In the midst of a write, which is then a short one. Other places each day."""
    last = harm(shim, tmp_path, "room", trials, int(time.strftime("%j")))
    assert last["trials"] == trials and last["bytes"] > 10_000


def kill_while_saving(out, kills, rng):
    """Train with a checkpoint a step, kill -9 at random moments; the step lost is at most the one under way."""
    command = [sys.executable, "-m", "fastgan.cli", "train"]
    options = [*SMALL, f"--out={out}", "--steps=1000000"]
    before = 0
    for kill in range(kills):
        with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
            while len(checkpoint.list_steps(out / "checkpoints")) < 2 or RunDirectory(out).last_step() <= before:
                if process.poll() is not None:
                    assert process.stderr is not None
                    pytest.fail(f"kill {kill}: {process.stderr.read()}")
                time.sleep(0.01)
            time.sleep(rng.random() * 0.2)
            process.send_signal(signal.SIGKILL)
        reached = max(json.loads(line)["step"] for line in (out / "log.jsonl").read_text().split("\n")[:-1] if line)
        found = RunDirectory(out).newest()
        assert found is not None and not found.damaged
        assert reached - 1 <= found.state["step"] <= reached, "more than one interval was lost"
        before, options = found.state["step"], ["--quiet", f"--resume={out}"]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(tmp_path, kills):
    kill_while_saving(tmp_path / "run", kills, random.Random(kills))
