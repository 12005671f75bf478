"""Trains a tiny run in a forked child whose file calls are harmed, then goes on with it in another: see test_faults.py.

    LD_PRELOAD=shim.so python driver.py FOLDER HOW STRIDE OFFSET      HOW: die, torn or full; harms call OFFSET + 1 and
                                                                      every STRIDE-th from there on
    LD_PRELOAD=shim.so python driver.py FOLDER room TRIALS SEED       the disk is full after a random number of bytes

Prints a line of JSON for each trial that went wrong, and at last the number of calls, of bytes and of trials.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_run import TINY, noise

import fastgan
from fastgan.training import checkpoint
from fastgan.training.rundir import RunDirectory, read_log
from fastgan.training.trainer import Trainer

HOW = {"count": 0, "die": 1, "torn": 2, "full": 3, "room": 4}
shim = ctypes.CDLL(None)
for function in (shim.fault_count, shim.fault_bytes, shim.fault_refused, shim.fault_growing):
    function.restype = ctypes.c_long
RECIPE = TINY.replace(steps=4, sample_every=2, checkpoint_every=1, ema=None, sample_count=2)


def child(work) -> tuple[int, str]:
    """(exit status, what was said on stderr) of `work` in a fork; -9 where it was killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 2)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
        code = 0
        try:
            with fastgan.backend("reference"):
                work()
        except (OSError, ValueError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = 2
        except BaseException:
            traceback.print_exc()
            code = 3
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def start(out: Path, at: int, how: str) -> None:
    run = Trainer(RECIPE, out=out, device="cpu", images=noise(), quiet=True)
    shim.fault_arm(os.fsencode(out), ctypes.c_long(at), HOW[how])
    try:
        run.fit()
    finally:
        numbers = shim.fault_count(), shim.fault_bytes(), shim.fault_refused(), shim.fault_growing()
        (out.parent / "counts").write_text(" ".join(map(str, numbers)))
        shim.fault_arm(b"/nowhere", ctypes.c_long(0), -1)


def counts(folder: Path) -> tuple[int, ...]:
    """Calls, bytes written, calls that found a full disk and the last that needs room, of the last `start` that was not
    killed."""
    return tuple(map(int, (folder / "counts").read_text().split()))


def again(out: Path) -> None:
    """As a user would: go on with the run if it has a configuration, else begin it."""
    if not (out / "config.json").exists():
        Trainer(RECIPE, out=out, device="cpu", images=noise(), quiet=True).fit()
        return
    found = RunDirectory(out).newest()
    if found is None or found.state["step"] < RECIPE.steps or not RunDirectory(out).finished:
        Trainer(RECIPE, resume=out, images=noise(), quiet=True).fit()


def facts(out: Path) -> dict:
    """What has to be the same: every tensor of the last checkpoint, the losses, the files."""
    sums = checkpoint._checksums(checkpoint.load(checkpoint.path_of(out / "checkpoints", RECIPE.steps)))
    del sums["plain values"]
    log = [(r["step"], r["d_loss"], r["g_loss"]) for r in read_log(out / "log.jsonl")]
    # what a process leaves that was killed after its run's end lies in no one's way: a report under way, a stale lock
    torn = [str(p) for p in out.rglob("*") if ".part" in p.name and ".report." not in p.name]
    pictures = {p.name: p.read_bytes() for p in (out / "samples").glob("*.png")}
    return {"sums": sums, "log": log, "torn": torn, "last picture": pictures[max(pictures)]}


def main() -> None:
    torch.set_num_threads(1)  # a fork after a parallel region would deadlock
    folder, how, many, which = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    straight = folder / "straight"
    status, said = child(lambda: start(straight, 0, "count"))
    if status:
        raise SystemExit(f"the straight run failed: {said}")
    want = facts(straight)
    calls, written, _, growing = counts(folder)
    if how == "full":
        calls = growing  # those behind it flush, rename and remove: a full disk refuses none of them
    places: Sequence[int] = range(1 + which, calls + 1, many)
    if how == "room":
        places = sorted(random.Random(which).sample(range(written), many))
    for at in places:
        out, wrong = folder / "run", []
        shutil.rmtree(out, ignore_errors=True)
        status, said = child(lambda out=out, at=at: start(out, at, how))
        if how in ("full", "room"):
            lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
            if status not in (0, 2) or (status == 2 and (len(lines) != 1 or "the disk is full" not in lines[0])):
                wrong.append(f"status {status}, said {said}")
            if not counts(folder)[2]:
                wrong.append("the disk was never full")
        elif status != -9:
            wrong.append(f"not killed: status {status}, said {said}")
        kept = len(checkpoint.list_steps(out / "checkpoints"))
        status, said = child(lambda out=out: again(out))
        if status:
            wrong.append(f"resuming gave {status}: {said}")
        else:
            found = facts(out)
            wrong += [key for key in want if found[key] != want[key]]
        if wrong:
            print(json.dumps({"at": at, "checkpoints": kept, "wrong": wrong}), flush=True)
    print(json.dumps({"calls": calls, "bytes": written, "trials": len(places)}))


main()
