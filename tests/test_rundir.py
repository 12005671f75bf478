"""A run directory: who may write it, what is left after faults, and that nothing of it is believed unread."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tiny_run import TINY, assert_same_state, noise, trainer

import fastgan
from fastgan.cli import main
from fastgan.training import checkpoint, report, sampling
from fastgan.training.lock import LockedError, RunLock
from fastgan.training.rundir import CONTENTS, RunDirectory, read_log
from fastgan.training.thinning import kept
from fastgan.training.trainer import Trainer

SMALL = [
    *("--recipe=dcgan-28", "--backend=reference", "--device=cpu", "--batch-size=4"),
    *("--set=image_size=8", "--set=latent=5", "--set=model_options.g_width=2", "--set=model_options.d_width=2"),
    *("--set=sample_count=4", "--set=log_every=1"),
]


@pytest.fixture
def images():
    return noise()


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


def flip(path, offset, bit=0):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------- one process


def test_a_second_run_in_the_directory_is_refused_and_names_the_first(images, tmp_path):
    refused = []

    def meddle(run: Trainer) -> bool:
        for options in ({"resume": tmp_path}, {"out": tmp_path, "overwrite": True}):
            with pytest.raises(LockedError, match=rf"process {os.getpid()} on .*, since .*; stop it or choose"):
                Trainer(TINY, images=images, quiet=True, **options)
            refused.append(options)
        return False

    assert trainer(images, tmp_path, target=meddle).fit().step == 6
    assert len(refused) == 10  # the target is not asked after the last step
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "lock").exists()


def test_two_runs_made_before_either_began(images, tmp_path):
    first, second = trainer(images, tmp_path), trainer(images, tmp_path)
    first.fit()
    with pytest.raises(ValueError, match="must be new or empty"):
        second.fit()
    resumed = [Trainer(TINY.replace(steps=8), resume=tmp_path, images=images, quiet=True) for _ in range(2)]
    resumed[0].fit()
    with pytest.raises(ValueError, match="must be as it was read, at step 6; another process has trained in it"):
        resumed[1].fit()
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(1, 9))


def test_a_run_that_was_replaced_is_not_gone_on_with(images, tmp_path):
    trainer(images, tmp_path).fit()
    stale = Trainer(TINY.replace(steps=8), resume=tmp_path, images=images, quiet=True)
    trainer(images, tmp_path, TINY.replace(steps=2), overwrite=True).fit()
    with pytest.raises(ValueError, match="another process has trained in it"):
        stale.fit()


def holder(**changes):
    lock = RunLock.__module__
    identity = sys.modules[lock]._identity()
    return json.dumps(identity | changes)


def test_stale_locks_are_recognised(images, tmp_path, monkeypatch):
    path = tmp_path / "lock"
    gone = subprocess.Popen(["true"])
    gone.wait()
    for content in ("", "no json", "[]", holder(pid=gone.pid), holder(process_started=1)):
        path.write_text(content)
        lock = RunLock(path)
        lock.acquire()
        assert json.loads(path.read_text())["pid"] == os.getpid()
        lock.release()
        assert not path.exists()
    path.write_text(holder(host="another"))
    with pytest.raises(LockedError, match=r"on another, since .*; if that process is gone, delete .*lock"):
        RunLock(path).check()
    # a file system without locks: the process that the file names decides
    module = sys.modules[RunLock.__module__]
    monkeypatch.setattr(module, "_try_lock", lambda at: None)
    path.write_text(holder())
    with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        RunLock(path).check()
    path.write_text(holder(pid=gone.pid))
    RunLock(path).check()
    path.write_text(holder(process_started=1))  # the number was given to another process since
    RunLock(path).check()


def test_only_one_of_many_takes_a_lock(tmp_path):
    path, taken = tmp_path / "lock", []
    path.write_text(holder(process_started=1))

    def take() -> None:
        lock = RunLock(path)
        try:
            lock.acquire()
        except LockedError:
            return
        taken.append(lock)
        time.sleep(1.0)

    threads = [threading.Thread(target=take) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    taken[0].release()


# ---------------------------------------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints of steps 4 and 6."""
    torch.set_num_threads(1)  # as in every test: another number of threads gives other bits
    out = tmp_path_factory.mktemp("finished") / "run"
    with fastgan.backend("reference"):
        trainer(noise(), out).fit()
    return out


def test_every_flipped_bit_is_found_or_changes_nothing(finished, tmp_path):
    """Bits of the archive's own headers and padding may flip unseen: then the state is the one that was saved."""
    whole = checkpoint.path_of(finished / "checkpoints", 6)
    want = checkpoint._checksums(checkpoint.load(whole))
    path, size, rng = tmp_path / whole.name, whole.stat().st_size, random.Random(0)
    found = 0
    for _ in range(300):
        shutil.copy(whole, path)
        flip(path, rng.randrange(size), rng.randrange(8))
        try:
            state = checkpoint.load(path)
        except checkpoint.DamagedError as error:
            found += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert checkpoint._checksums(state) == want
    assert found > 30
    for cut in (0, 1, size // 2, size - 1):
        path.write_bytes(whole.read_bytes()[:cut])
        with pytest.raises(checkpoint.DamagedError):
            checkpoint.load(path)


def test_every_tensor_is_under_a_checksum(tmp_path):
    state = {
        "step": 1,
        "x": [torch.arange(6.0).view(2, 3), torch.tensor(3), torch.zeros(0), torch.ones(3, dtype=torch.bfloat16)],
        "y": {"b": torch.tensor([True, False]), "c": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)},
        "plain": {"text": "a\udcff", "number": 0.1, "none": None},
    }
    path = tmp_path / "step-0000001.pt"
    checkpoint.save(state, path)
    assert checkpoint.load(path)["plain"] == state["plain"]
    raw = torch.load(path, weights_only=True)
    assert set(raw["checksums"]) == {"x.0", "x.1", "x.2", "x.3", "y.b", "y.c", "plain values"}
    for name, change in {
        "x.0": lambda s: s["x"][0].view(-1)[5].add_(1e-6),
        "x.1": lambda s: s["x"][1].add_(1),
        "y.b": lambda s: s["y"]["b"].logical_not_(),
        "plain values": lambda s: s["plain"].update(number=0.2),
        "step": lambda s: s.update(checksums=None),
    }.items():
        other = torch.load(path, weights_only=True)
        change(other)
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(checkpoint.DamagedError, match=f"{name} has changed|holds no checksums"):
            checkpoint.load(tmp_path / "other.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_damage(tmp_path, value):
    path = tmp_path / "step-0000001.pt"
    checkpoint.save({"step": 1, "generator": {"w": torch.tensor([1.0, value])}}, path)
    with pytest.raises(checkpoint.DamagedError, match=r"must hold finite numbers, generator\.w is not"):
        checkpoint.load(path)


def test_large_numbers_are_no_damage():
    huge = torch.full((1000,), 3e38)
    assert checkpoint.first_nonfinite({"huge": huge, "empty": torch.zeros(0), "whole": torch.tensor(1)}) is None
    for value in (float("inf"), float("-inf"), float("nan")):
        assert checkpoint.first_nonfinite({"a": {"b": torch.tensor([1.0, value, -value])}}) == "a.b"


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_sound_one(images, finished, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = checkpoint.path_of(run / "checkpoints", 6)
    flip(newest, newest.stat().st_size // 2)
    said = r"step-0000006.pt must be .* it is damaged: .*; step-0000004.pt, the newest sound one, is used"
    sampling.load_generator(run)
    assert len(caplog.messages) == 1 and re.search(said, caplog.text)
    assert newest.exists()  # sampling changes nothing
    resumed = Trainer(TINY.replace(steps=8), resume=run, images=images, quiet=True)
    assert resumed.step == 4
    resumed.fit()
    assert checkpoint.list_steps(run / "checkpoints") == [6, 8]
    assert newest.with_suffix(".damaged").exists()
    straight = trainer(images, tmp_path / "straight", TINY.replace(steps=8))
    straight.fit()
    assert_same_state(straight, resumed)


def test_where_no_checkpoint_is_sound(images, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for step in (4, 6):
        checkpoint.path_of(run / "checkpoints", step).write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-0000006.pt .* nor do the 1 older ones; nothing sound is left in"):
        Trainer(resume=run, images=images)
    assert main(["sample", "--run", str(run), "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_that_lacks_keys_or_fits_other_networks(images, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = checkpoint.path_of(run / "checkpoints", 6)
    state = checkpoint.load(path)
    for key in ("rng", "generator"):
        checkpoint.save({k: v for k, v in state.items() if k != key}, path)
        with pytest.raises(ValueError, match=f"step-0000006.pt must hold .* it lacks {key}"):
            Trainer(TINY.replace(steps=8), resume=run, images=images)
    state["sampler"] = {"another": torch.zeros(1)}
    checkpoint.save(state, path)
    with pytest.raises(
        ValueError, match=r"step-0000006.pt: generator must fit the networks, it does not: Missing"
    ) as e:
        sampling.load_generator(run)
    assert "\n" not in str(e.value)


def test_the_last_good_checkpoint_is_one_that_was_read(images, tmp_path):
    def poison(run: Trainer) -> bool:
        if run.step == 5:
            newest = checkpoint.path_of(tmp_path / "checkpoints", 4)
            flip(newest, newest.stat().st_size // 2)
            with torch.no_grad():
                run.discriminator.dense.bias.fill_(float("nan"))
        return False

    with pytest.raises(RuntimeError, match=r"the last good checkpoint is .*step-0000002\.pt"):
        trainer(images, tmp_path, target=poison).fit()


# --------------------------------------------------------------------------------------- errors and signals


class Lost(Exception):
    pass


def test_an_error_between_steps_saves_the_last_one(images, tmp_path, capsys):
    straight = trainer(images, tmp_path / "straight")
    straight.fit()

    def fails(run: Trainer) -> bool:
        if run.step == 3:
            raise Lost
        return False

    with pytest.raises(Lost):
        trainer(images, tmp_path / "run", target=fails).fit()
    assert "the run can go on from step 3: fastgan train --resume" in capsys.readouterr().err
    resumed = Trainer(resume=tmp_path / "run", images=images, quiet=True)
    assert resumed.step == 3
    resumed.fit()
    assert_same_state(straight, resumed)


@pytest.mark.parametrize("at", [1, 5])
def test_an_error_within_a_step_leaves_the_last_checkpoint(images, tmp_path, capsys, at):
    """D is updated and G is not: that state is none to go on from."""
    straight = trainer(images, tmp_path / "straight")
    straight.fit()
    run = trainer(images, tmp_path / "run")
    original, calls = run.train_step.g_optimizer.step, []

    def fails(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise Lost
        return original(*args, **options)

    run.train_step.g_optimizer.step = fails
    with pytest.raises(Lost):
        run.fit()
    assert f"the run can go on from step {at - 1}" in capsys.readouterr().err
    resumed = Trainer(resume=tmp_path / "run", images=images, quiet=True)
    assert resumed.step == at - 1
    resumed.fit()
    assert_same_state(straight, resumed)


def test_a_run_without_a_checkpoint_begins_anew_from_its_configuration(images, tmp_path):
    trainer(images, tmp_path / "straight").fit()
    killed = trainer(images, tmp_path / "run")
    killed.directory.path.mkdir()
    killed.directory.begin(killed.config, 0)
    killed.directory.append({"step": 1, "d_loss": 0.5})
    resumed = Trainer(resume=tmp_path / "run", images=images, quiet=True)
    assert resumed.step == 0 and resumed.fit().step == 6
    assert [r["step"] for r in read_log(tmp_path / "run/log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_what_a_run_leaves_that_was_killed_at_once_is_no_obstacle(images, tmp_path):
    for name in ("samples", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "lock").write_text(holder(process_started=1))
    (tmp_path / ".config.1234abcd.part.json").write_text("{")
    assert trainer(images, tmp_path).fit().step == 6
    assert {p.name for p in tmp_path.iterdir()} <= set(CONTENTS)


def test_a_display_that_fails_ends_the_display_alone(images, tmp_path, monkeypatch):
    run = trainer(images, tmp_path)

    class Broken:
        def __getattr__(self, name):
            raise BrokenPipeError(32, "Broken pipe")

    run.progress._shown = Broken()
    monkeypatch.setattr(sys.modules["fastgan.training.progress"], "silence", lambda stream: None)
    assert run.fit().reason == "steps"


def test_a_report_that_fails_leaves_a_finished_run(images, tmp_path, monkeypatch, capsys):
    def fails(*args, **options):
        raise ZeroDivisionError("no report today")

    monkeypatch.setattr(report, "write_report", fails)
    assert trainer(images, tmp_path).fit().reason == "steps"
    assert "the report could not be written: no report today" in capsys.readouterr().err
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [4, 6]


def test_a_hangup_saves(images, tmp_path):
    given = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's tests inherit that it is ignored

    def hang_up(run: Trainer) -> bool:
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # a closing terminal may send two
        return False

    try:
        result = trainer(images, tmp_path, target=hang_up).fit()
    finally:
        signal.signal(signal.SIGHUP, given)
    assert (result.reason, result.step) == ("interrupted", 3)
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [2, 3]


def test_an_ignored_hangup_stays_ignored(images, tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = trainer(
            images, tmp_path, target=lambda run: os.kill(os.getpid(), signal.SIGHUP) if run.step == 2 else False
        ).fit()
        assert result.reason == "steps" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("output", ["| head -1", "> /dev/full", ">&-", ">&- 2>&-", "| true"])
def test_a_run_whose_output_goes_away_goes_on_quietly(tmp_path, output):
    """In a shell, as a user would lose it."""
    out = tmp_path / "run"
    command = ["train", f"--out={out}", "--steps=40", "--set=data=emoji-64", *SMALL]
    line = " ".join([sys.executable, "-W", "error::ResourceWarning", "-m", "fastgan.cli", *command])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} {output}"], capture_output=True, text=True, env=os.environ
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert checkpoint.list_steps(out / "checkpoints") == [40]
    assert [r["step"] for r in read_log(out / "log.jsonl")] == list(range(1, 41))
    assert (out / "report.html").exists()


# ------------------------------------------------------------------------------------------------- the log


def test_the_report_survives_any_log(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    log, rng = run / "log.jsonl", random.Random(0)
    lines = log.read_text().splitlines()
    odd = [
        *("", "null", "[]", "3", '"text"', "{", "{}", '{"step": 1}', '{"step": "2"}', '{"step": -5}', '{"step": 1.5}'),
        *('{"step": true}', '{"step": 3, "d_loss": NaN, "g_loss": Infinity}', '{"step": 1e400}', "[" * 100_000),
        '{"step": 4, "d_loss": 1e308, "g_loss": -1e308, "images_per_second": 1' + "0" * 400 + "}",
        '{"step": 99999999999999999999999999, "d_loss": 1, "g_loss": 2}',
        '{"step": 5, "d_loss": "x", "images": [], "seconds": null, "memory_mb": {}, "images_per_second": "fast"}',
        '{"step": 6, "d_loss": 0.5, "g_loss": 0.5, "seconds": 1e29, "images": 1e29}',
    ]
    for trial in range(150):
        chosen = rng.choices(lines + odd, k=rng.randrange(12))
        text = "\n".join(chosen)
        cut = text[: rng.randrange(len(text) + 1)] if rng.random() < 0.3 else text
        log.write_bytes(cut.encode() + (b"\xff\xfe" if rng.random() < 0.2 else b""))
        page = report.write_report(run, status=f"trial {trial}")
        assert "</html>" in page.read_text()
        steps = [r["step"] for r in read_log(log)]
        assert steps == sorted(set(steps))


def test_a_report_of_two_runs_in_one_log(finished, tmp_path):
    """25 lines for 13 steps, back and forth: it died of `math domain error`."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    record = read_log(run / "log.jsonl")[0]
    steps = [*range(13, 0, -1), *range(1, 13)]
    (run / "log.jsonl").write_text("".join(json.dumps(record | {"step": step}) + "\n" for step in steps))
    report.write_report(run, status="twice")
    assert [r["step"] for r in RunDirectory(run).read_config() and read_log(run / "log.jsonl")] == list(range(1, 14))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"recipe": 3}', '{"recipe": {}}', "[" * 100_000, '{"recipe": null}'])
def test_a_configuration_that_is_none(finished, tmp_path, text):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json must be the configuration of a run, reading it gave") as error:
        RunDirectory(run).read_config()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- long runs


@pytest.mark.parametrize("most", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("every", [1, 7, 1000])
def test_what_is_kept_of_a_long_run_lies_evenly_over_it(most, every):
    held, greatest = set(), 0
    for step in range(0, 2500 * every, every):
        held = kept(dict.fromkeys([*held, step], 0), most)
        greatest = max(greatest, len(held))
        assert step in held
    assert greatest == most
    gaps = [b - a for a, b in zip(sorted(held)[:-1], sorted(held)[1:], strict=True)]
    if most >= 7:
        assert len(held) >= most // 4 and min(held) == 0
        # parts are of one length where all was thinned out, and the newest steps may all be there
        assert max(gaps) <= 2 * 2500 * every / (most // 4)


def test_of_each_part_the_record_with_most_numbers_is_kept_and_the_best_one():
    weights = {step: 3 if step % 10 == 0 else 1 for step in range(100)}
    found = kept(weights, 20, [77])
    assert found == {0, 20, 40, 50, 70, 77, 80, 96, 99}  # parts are of 16 steps


def test_pictures_and_log_of_a_long_run_are_bounded(images, tmp_path):
    recipe = TINY.replace(steps=40, sample_every=1, keep_samples=8, keep_records=10, eval_every=0)
    trainer(images, tmp_path / "run", recipe).fit()
    run = RunDirectory(tmp_path / "run")
    assert 4 <= len(list(run.samples.iterdir())) <= 8
    assert {run.grid(0), run.grid(40)} <= set(run.samples.iterdir())
    steps = [record["step"] for record in read_log(run.log)]
    assert 5 <= len(steps) <= 10 and steps[-1] == 40 and steps[0] <= 4
    assert len(run.log.read_text().splitlines()) == len(steps)
    page = run.report.read_text()
    shown = len(list(run.samples.iterdir()))
    assert f"max='{shown - 1}' value='{shown - 1}'" in page and page.count('<figure class="now"') == 1
    # a resumed run may keep more
    Trainer(recipe.replace(steps=44, keep_samples=0, keep_records=0), resume=run.path, images=images, quiet=True).fit()
    assert len(list(run.samples.iterdir())) == shown + 4
    assert [r["step"] for r in read_log(run.log)] == [*steps, 41, 42, 43, 44]


def test_what_lies_beside_a_grid_goes_with_it(tmp_path):
    run = RunDirectory(tmp_path)
    run.samples.mkdir()
    for step in range(9):
        for suffix in (".png", ".wav"):
            run.grid(step).with_suffix(suffix).touch()
    (run.samples / "step-mine.png").touch()
    (run.samples / "notes.txt").touch()
    run.thin_samples(4, 3)  # after the run went back to step 2
    steps = [f"step-{step:07d}{suffix}" for step in (0, 3, 8) for suffix in (".png", ".wav")]
    assert sorted(path.name for path in run.samples.iterdir()) == ["notes.txt", *steps, "step-mine.png"]


def test_a_page_does_without_a_grid_that_was_deleted_meanwhile(images, tmp_path, monkeypatch):
    trainer(images, tmp_path).fit()
    run = RunDirectory(tmp_path)
    glob = type(run.samples).glob

    def late(self, pattern):
        found = list(glob(self, pattern))
        run.grid(2).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(type(run.samples), "glob", late)
    assert "max='2' value='2'" in report.page(run)
