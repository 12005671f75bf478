"""Several processes train one run: two over gloo, started once for all tests but the one that kills a rank."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed_ranks import CASES, PART, RANKS, batches, derivatives, parts_of_batch, step_of, weights
from PIL import Image
from processes import end_with_this, environment, free_port, launch
from sharing_ranks import KINDS, LOADERS, counting, parts_of, write_sets
from tiny_run import TINY, noise, trainer

from fastgan import data
from fastgan._ranks import LostRankError, together
from fastgan.data.imageset import Batches
from fastgan.training import checkpoint
from fastgan.training.distributed import World, join
from fastgan.training.recovery import check_action
from fastgan.training.rundir import read_log

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank of `distributed_ranks` found."""
    folder = tmp_path_factory.mktemp("ranks")
    write_sets(folder / "sets")
    (folder / "photos").mkdir()
    for k, picture in enumerate(np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), np.uint8)):
        Image.fromarray(picture).save(folder / "photos" / f"{k:02d}.png")
    launch("distributed_ranks.py", RANKS, str(folder))
    found = [torch.load(folder / f"rank-{k}.pt", weights_only=True) for k in range(RANKS)]
    return found, folder


@pytest.mark.parametrize("name", CASES)
def test_ranks_stay_equal(ranks, name):
    a, b = (found[name]["weights"] for found in ranks[0])
    assert torch.equal(a, b)
    assert (a[1:] != a[:-1]).any(1).all()


@pytest.mark.parametrize("name", [name for name, (_, norm) in CASES.items() if not norm])
def test_ranks_equal_one_process_with_the_whole_batch(ranks, name):
    """Lazy R1, a gradient penalty, accumulation and several D updates; clipping sees the averaged gradient."""
    step = step_of(name)
    for k, (real, z) in enumerate(batches(name)):
        step(real, z=z)
        torch.testing.assert_close(ranks[0][0][name]["weights"][k], weights(step), rtol=1e-10, atol=1e-12)


def test_batch_norm_takes_the_statistics_of_its_rank(ranks):
    """Beside a textbook loop in one process that runs each rank's part by itself."""
    step = step_of("batch-norm")
    g, d, sp = step.generator, step.discriminator, F.softplus
    for k, ((real,), (z,)) in enumerate(batches("batch-norm")):
        parts = list(zip(real.split(PART), z.split(PART), strict=True))
        fakes = [g(latents) for _, latents in parts]
        step.d_optimizer.zero_grad()
        for (x, _), fake in zip(parts, fakes, strict=True):
            ((sp(-d(x)).mean() + sp(d(fake.detach())).mean()) / RANKS).backward()
        step.d_optimizer.step()
        step.g_optimizer.zero_grad()
        sum(sp(-d(fake)).mean() / RANKS for fake in fakes).backward()
        step.g_optimizer.step()
        torch.testing.assert_close(ranks[0][0]["batch-norm"]["weights"][k], weights(step), rtol=1e-9, atol=1e-11)
    first, second = (found["batch-norm"]["buffers"] for found in ranks[0])
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batch_norm_over_ranks_of_unequal_batches(ranks):
    """Two statistics groups, channels_last, a mean of 10^4: y and both derivatives beside the joined batch."""
    halves = [[part.chunk(2) for part in (x, weights)] for x, _, _, weights in map(parts_of_batch, range(RANKS))]
    x, weights = (torch.cat([halves[k][i][g] for g in range(2) for k in range(RANKS)]) for i in range(2))
    want = derivatives(x, *parts_of_batch(0)[1:3], weights)
    join_groups = lambda parts: torch.cat([part.chunk(2)[g] for g in range(2) for part in parts])
    found = [f["synchronised"] for f in ranks[0]]
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    close(join_groups([f["y"] for f in found]), want["y"])
    for order in ("first", "second"):
        close(join_groups([f[order][0] for f in found]), want[order][0])
        for i in range(1, len(want[order])):  # parameters get each rank's share
            close(sum(f[order][i] for f in found), want[order][i])
    for f in found:
        close(f["running"], want["running"])
        assert f["collectives"] == (1, 1 + 2)  # forward; backward and the backward of that: docs/scaling.md
        assert "must be nn.BatchNorm1d or nn.BatchNorm2d, got BatchNorm3d at 0" in f["declined"]


def test_a_gradient_of_some_ranks_counts_as_zeros_on_the_others(ranks):
    for found in ranks[0]:
        full, some, none = found["exchange"]["grads"]
        assert torch.equal(full, 1.5 * torch.arange(6.0).view(3, 2).t())
        assert torch.equal(some, torch.full((4,), 4.0)) and none is None
        assert "from the first update on" in found["exchange"]["late"]


def test_ranks_agree(ranks):
    for found in ranks[0]:
        assert found["exchange"]["agreed"] == "interrupted"
        assert found["exchange"]["mean"] == {"a": 0.5}
        assert re.search(r"data must be the same on every rank.*folder-0.*folder-1", found["exchange"]["differ"])


def test_a_run_of_two_ranks_goes_on_bit_for_bit(ranks):
    (first, second), folder = [found["runs"] for found in ranks[0]], ranks[1]
    assert first["began"] == second["began"] == 3
    for found in (first, second):
        assert found["compared"] > 50 and found["differ"] == []
    assert torch.equal(first["weights"], second["weights"])
    assert not torch.equal(first["z"], second["z"])
    assert len(first["next"]) == len(second["next"]) == TINY.batch_size // RANKS
    assert not set(first["next"].tolist()) & set(second["next"].tolist())
    records = read_log(folder / "straight" / "log.jsonl")
    assert [r["step"] for r in records] == list(range(1, 7))
    assert records[-1]["images"] == 6 * TINY.batch_size
    assert (folder / "straight" / "report.html").exists() and not (folder / "straight" / "lock").exists()


def test_a_signal_to_one_rank_ends_all_after_the_same_step(ranks):
    first, second = (found["signalled"] for found in ranks[0])
    reason, step, path = first
    assert first == second and reason == "interrupted" and 1 <= step < 500
    assert checkpoint.load(path)["step"] == step


def test_one_rank_decodes_for_all(ranks):
    first, second = (found["decoded"] for found in ranks[0])
    assert sorted(first["names"] + second["names"]) == [f"{k:02d}.png" for k in range(20)]
    for found in (first, second):
        assert torch.equal(found["images"], data.load(ranks[1] / "photos", image_size=8).images)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_reads_each_kind_for_all(ranks, kind, monkeypatch):
    (first, mine), (second, yours) = (found["read"][kind] for found in ranks[0])
    files = counting(kind, monkeypatch.setattr)
    direct = [part.values for part in parts_of(LOADERS[kind](ranks[1] / "sets" / kind))]
    assert first + second == len(files)  # of two sides each rank may have read one
    for values in (mine, yours):
        assert all(torch.equal(a, b) for a, b in zip(values, direct, strict=True))


def test_one_process_goes_on_with_a_run_of_two(ranks):
    run = trainer(noise(), None, TINY.replace(steps=8), resume=ranks[1] / "straight")
    assert run.step == 6 and run.world == World()
    assert len(run.notes) == 1 and run.notes[0].startswith("the run goes on with 1 rank, 2 saved step 6: ")
    assert run.fit().reason == "steps"


def test_parts_make_the_batch():
    images = noise()
    whole, *parts = (
        Batches(images, 6, generator=torch.Generator().manual_seed(1), flip=True, part=part)
        for part in ((0, 1), (0, 3), (1, 3), (2, 3))
    )
    for _ in range(4):
        assert torch.equal(next(whole)[0], torch.cat([next(part)[0] for part in parts]))
    for part, last in (((0, 4), True), ((3, 3), True), ((0, 2), False)):
        with pytest.raises(ValueError, match="part must be"):
            images.batches(6, part=part, drop_last=last)


def test_the_environment_must_say_which_rank_this_is(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK must be a number, as torchrun sets it, got None"):
        join()
    with pytest.raises(ValueError, match="multiple of the 2 ranks, got 5; take 4 or another number of ranks"):
        World(0, 2).check_batch(5)
    with pytest.raises(ValueError, match="must be warn on several ranks, got 'stop'"):
        check_action("stop", 2)


def test_a_lost_rank_is_told_without_the_place_in_gloo():
    said = "[/src/gloo/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3270. This may indicate that a remote"
    wanted = r"be reached \(Connection closed by peer \[127.0.0.1\]:3270\); its own"
    with pytest.raises(LostRankError, match=wanted), together(2):
        raise RuntimeError(said)
    assert World(0, 2).command("runs/a") == "torchrun ... -m fastgan train --resume runs/a"


def training(out: Path, *torchrun: str, more: tuple[str, ...] = ()) -> list[str]:
    """A run of two ranks on the smallest networks, with a checkpoint at every 20th step."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()),
        *(*torchrun, "-m", "fastgan", "train", "--recipe", "dcgan-28", "--data", "fashion-mnist", "--out", str(out)),
        *("--batch-size", "8", "--precision", "fp32", "--set", "checkpoint_every=20", "--set", "log_every=10"),
        *("--set", "model_options.g_width=2", "--set", "model_options.d_width=2", *more),
    ]


def kill_a_rank(folder: Path, rank: int) -> None:
    """torchrun says which rank it was, the other one how to go on; the last checkpoint is sound."""
    out = folder / "run"
    with open(folder / "said", "w+") as said:
        job = start(training(out), said)
        try:
            wait_for(lambda: checkpoint.list_steps(out / "checkpoints"), job)
            os.kill(rank_of(job.pid, rank), signal.SIGKILL)
            code = job.wait(timeout=60)
        finally:
            job.kill()
            job.wait()
        said.seek(0)
        text = said.read()
    assert code == 1 and "exitcode  : -9" in text, text[-2000:]
    assert "another rank has ended, the run can go on from step" in text, text[:2000]
    found = checkpoint.newest(out / "checkpoints")
    assert found is not None and found.damaged == {} and len(found.state["ranks"]) == 2


def test_a_killed_rank_ends_the_job(tmp_path):
    kill_a_rank(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_ten_killed_ranks(tmp_path, trial):
    kill_a_rank(tmp_path, trial % 2)


@pytest.mark.slow
@pytest.mark.parametrize("told", ["torchrun", "rank 0", "rank 1"])
def test_a_run_that_is_told_to_end_saves_and_exits_with_130(tmp_path, told):
    """SIGTERM as a scheduler sends it. torchrun's own code is 1; ending.json says that the run was interrupted."""
    out = tmp_path / "run"
    with open(tmp_path / "said", "w+") as said:
        job = start(training(out), said)
        try:
            wait_for(lambda: checkpoint.list_steps(out / "checkpoints"), job)
            os.kill(job.pid if told == "torchrun" else rank_of(job.pid, int(told[-1])), signal.SIGTERM)
            code = job.wait(timeout=60)
        finally:
            job.kill()
            job.wait()
        said.seek(0)
        text = said.read()
    assert code == 1, text[-3000:]
    ended = json.loads((out / "ending.json").read_text())
    found = checkpoint.newest(out / "checkpoints")
    assert ended["status"] == "interrupted" and found is not None and found.damaged == {}
    assert f"interrupted: step {found.state['step']}," in text and (out / "report.html").exists()
    if told != "torchrun":  # torchrun tells nothing of its ranks when it was told to end itself
        assert len(re.findall(r"exitcode  : 130 ", text)) == 2, text[-3000:]


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(tmp_path):
    """--max-restarts and --continue: the run goes on from its checkpoint and comes to its end."""
    out = tmp_path / "run"
    command = training(out, "--max-restarts", "1", more=("--continue", "--steps", "400"))
    with open(tmp_path / "said", "w+") as said:
        job = start(command, said)
        try:
            wait_for(lambda: checkpoint.list_steps(out / "checkpoints"), job)
            os.kill(rank_of(job.pid, 1), signal.SIGKILL)
            code = job.wait(timeout=300)
        finally:
            job.kill()
            job.wait()
        said.seek(0)
        text = said.read()
    assert code == 0, text[-3000:]
    began = [int(step) for step in re.findall(r"step (\d+) to 400", text)]
    assert len(began) == 2 and began[0] == 0 and began[1] >= 20, text[-3000:]
    assert checkpoint.list_steps(out / "checkpoints")[-1] == 400


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child that its parent is gone")
@pytest.mark.slow
def test_ranks_end_with_a_launcher_that_was_killed(tmp_path):
    out = tmp_path / "run"
    with open(tmp_path / "said", "w+") as said:
        job = start(training(out), said)
        wait_for(lambda: checkpoint.list_steps(out / "checkpoints"), job)
        ranks = [rank_of(job.pid, k) for k in range(2)]
        job.kill()
        job.wait()
        wait_for(lambda: not any(is_running(rank) for rank in ranks), seconds=60)
    ended = json.loads((out / "ending.json").read_text())
    assert ended["status"] == "interrupted" and checkpoint.newest(out / "checkpoints").damaged == {}


def start(command, said) -> subprocess.Popen:
    """The job, its words written to the file `said`."""
    where = environment(FASTGAN_BACKEND="reference")
    return subprocess.Popen(command, env=where, stdout=said, stderr=said, preexec_fn=end_with_this)


def is_running(process: int) -> bool:
    """Whether there is such a process, and it is no zombie that nobody asked for its code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(ready, job=None, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert (job is None or job.poll() is None) and time.monotonic() < end
        time.sleep(0.1)


def rank_of(parent: int, rank: int) -> int:
    """The process of a rank, a child of torchrun's."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                names = (status.parent / "environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in names:
                    return int(status.parent.name)
        except OSError:
            continue
    raise AssertionError(f"torchrun has no process of rank {rank}")
