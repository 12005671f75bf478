"""The program: every command on a tiny run, one clear line for wrong input, what doctor reports."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastgan
from fastgan.cli import build_parser, main
from fastgan.data.clips import ClipSet
from fastgan.doctor import machine
from fastgan.training import checkpoint, progress

SMALL = [
    "--backend=reference",
    "--device=cpu",
    "--batch-size=4",
    "--set=image_size=8",
    "--set=latent=5",
    "--set=model_options.g_width=2",
    "--set=model_options.d_width=2",
    "--set=sample_count=4",
    "--set=log_every=1",
]


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten grey pictures of 8x8, as a .npy."""
    path = tmp_path_factory.mktemp("data") / "noise.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--recipe=dcgan-28", f"--data={data}", f"--out={out}", "--steps=2", "--quiet", *SMALL]) == 0
    return out


def size(path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_train_shows_lines_without_a_terminal(tmp_path, data, capsys):
    out = tmp_path / "run"
    code = main(
        [
            "train",
            "--recipe",
            "dcgan-28",
            "--data",
            data,
            "--out",
            str(out),
            "--steps",
            "2",
            "--seed",
            "3",
            *SMALL,
        ]
    )
    shown = capsys.readouterr()
    assert code == 0 and shown.err == ""
    lines = shown.out.splitlines()
    first = re.escape("dcgan-28 on noise (10 images), cpu, ") + r"(fp32|bf16) \(auto: .+\): step 0 to 2, writing to "
    assert re.fullmatch(first + re.escape(str(out)), lines[0])
    assert lines[1].startswith("step 1/2  images/s ") and "D(G(z))" in lines[1]
    assert lines[2].startswith("step 2/2  ") and lines[2].endswith("left 0:00")
    assert lines[3].startswith("all steps done: step 2, ") and lines[3].endswith(f"report: {out}/report.html")
    config = json.loads((out / "config.json").read_text())
    assert config["backend"] == "reference" and config["recipe"]["seed"] == 3
    assert config["recipe"]["model_options"] == {"g_width": 2, "d_width": 2}


def test_train_resumes_and_overwrites(tmp_path, data, capsys):
    out = str(tmp_path / "run")
    start = ["train", "--recipe=dcgan-28", f"--data={data}", f"--out={out}", "--quiet", *SMALL]
    assert main([*start, "--steps=1"]) == 0
    assert main([*start, "--steps=1"]) == 2
    assert "must be new or empty, it holds files; resume the run in it (--resume" in capsys.readouterr().err
    assert main(["train", "--resume", out, "--steps=3", "--quiet"]) == 0
    assert checkpoint.list_steps(f"{out}/checkpoints") == [1, 3]
    assert json.loads((tmp_path / "run/config.json").read_text())["recipe"]["steps"] == 3
    assert main([*start, "--steps=2", "--overwrite"]) == 0
    assert checkpoint.list_steps(f"{out}/checkpoints") == [2]
    assert capsys.readouterr() == ("", "")  # quiet


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe=dcgan-28", "--dry-run", "--steps=1000", *SMALL]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {key.strip(): value.strip() for key, value in lines.items()}
    assert rows["batch_size"] == "4" and rows["device"] == "cpu, backend reference"
    assert rows["parameters"] == "generator 1,286, discriminator 273"
    assert "images/s (measured here: median of 5 steps on random images" in rows["a step"]
    assert rows["in all"].endswith("for 1,000 steps") and " MB (resident" in rows["memory"]
    assert not list(tmp_path.iterdir())


def test_sample(run, tmp_path, capsys):
    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        assert main(["sample", "--run", str(run), "--n=6", "--columns=3", f"--out={path}", f"--seed={seed}"]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    assert size(paths[0]) == (3 * (8 + 2) + 2, 2 * (8 + 2) + 2)
    assert main(["sample", "--run", str(run), "--n=6", "--truncation=0.5", f"--out={tmp_path / 'cut.png'}"]) == 0
    assert capsys.readouterr().err == ""


def test_evaluate(run, capsys):
    assert main(["evaluate", "--run", str(run), "--n=8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["features"]) == ["frechet", "kernel", "precision", "recall", "density", "coverage"]
    assert list(found["features_between_halves"]) == ["frechet", "kernel", "precision", "recall"]  # k=5 needs 6
    assert found["backbone"].startswith("small-") and found["generator"] in ("averaged", "as trained")
    assert found["n"] == 8 and list(found["sliced_wasserstein"]) == list(found["between_halves_of_the_images"]) == ["8"]
    assert main(["evaluate", "--run", str(run), "--n=8"]) == 0
    text = capsys.readouterr().out
    assert f"{found['sliced_wasserstein']['8']:.2f}" in text and f"{found['features']['kernel']:.4f}" in text
    assert found["backbone"] in text and "8 pictures" in text and "too few images" in text
    assert main(["evaluate", "--run", str(run), "--n=1"]) == 2
    assert "at least 2 images to compare with, got 1" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["slerp", "lerp"])
def test_interpolate(run, tmp_path, mode):
    start = ["interpolate", "--run", str(run), "--walks=3", "--frames=4", "--stops=2", f"--mode={mode}"]
    assert main([*start, f"--out={tmp_path / 'walk.gif'}"]) == 0
    with Image.open(tmp_path / "walk.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (2 * 8 * 12, 2 * 8 * 12) and gif.info["loop"] == 0
    assert main([*start, f"--out={tmp_path / 'walk.png'}"]) == 0
    assert size(tmp_path / "walk.png") == (4 * (8 + 2) + 2, 3 * (8 + 2) + 2)


def test_interpolate_to_mp4_names_the_package_it_needs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert main(["interpolate", "--run", str(run), f"--out={tmp_path / 'walk.mp4'}"]) == 2
    assert "mp4 needs the package imageio-ffmpeg" in capsys.readouterr().err


def test_data(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "list"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == {*fastgan.data.available(), "sentences", "drums", "moving-garments"}
    assert main(["data", "inspect", data]) == 0
    assert "10 images" in capsys.readouterr().out
    assert main(["data", "inspect", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 10
    assert main(["data", "prepare", data, "--out=small.npy", "--image-size=4", "--limit=5"]) == 0
    assert capsys.readouterr().out == "train on it with: --data small.npy\n"
    assert fastgan.data.load("small.npy").images.shape == (5, 1, 4, 4)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("train", "--recipe NAME or --data must be given, or --resume DIR; recipes: fastgan, mlp-28, dcgan-28"),
        ("train --recipe dcgan-99 --out x", "there is no recipe 'dcgan-99'"),
        ("train --recipe dcgan-28", "--out DIR must say where the run is written"),
        ("train --recipe dcgan-28 --steps 0 --out x", "must be a whole number of at least 1, got '0'"),
        ("train --recipe dcgan-28 --time-limit -1 --out x", "must be a number above 0, got '-1'"),
        ("train --recipe dcgan-28 --out x --eval-every 0", "must be a whole number of at least 1, got '0'"),
        ("train --recipe dcgan-28 --out x --eval-every 9 --target fid<2", "target must read NAME<NUMBER"),
        ("train --recipe dcgan-28 --out x --patience 3", "set eval_every (--eval-every STEPS)"),
        ("train --recipe dcgan-28 --out x --set eval_every=-1", "eval_every must be at least 0, got -1"),
        ("train --recipe dcgan-28 --out x --set g_lr=fast", "g_lr must be a number, got 'fast'"),
        ("train --recipe dcgan-28 --out x --set speed=1", "there is no field 'speed'"),
        ("train --recipe dcgan-28 --out x --data nowhere", "nowhere does not exist"),
        ("train --recipe dcgan-28 --out x --device gpu", "it must be auto, cpu or cuda[:N], got 'gpu'"),
        ("train --recipe dcgan-28 --out x --backend fast", "got 'fast'"),
        ("train --recipe dcgan-28 --resume x", "leave out --recipe"),
        ("train --resume nowhere", "nowhere must be a run directory"),
        ("sample --run nowhere --out x.png", "nowhere must be a run directory"),
        ("sample --run RUN --out x.jpg", "--out must end in .png, got x.jpg"),
        ("sample --run RUN --out x.png --label 3", "takes none"),
        ("sample --run RUN --out x.png --n 0", "whole number of at least 1"),
        ("evaluate --run RUN --weights x.pth", "--weights goes with --backbone inception, got small"),
        ("evaluate --run RUN --backbone vgg", "vgg"),
        ("evaluate --run nowhere", "nowhere must be a run directory"),
        ("interpolate --run RUN --out x.avi", "--out must end in .gif, .mp4 or .png, got x.avi"),
        ("interpolate --run RUN --out x.gif --stops 1", "--stops must be at least 2, got 1"),
        ("data inspect nowhere", "nowhere does not exist"),
        ("data prepare fashion-mnist --out x.zip", "x.zip"),
        ("data", "the following arguments are required: VERB"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    assert main(command.replace("RUN", str(run)).split()) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err
    assert shown.err.startswith("fastgan") and not list(tmp_path.iterdir())


def test_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        main(["train", "--resume", "nowhere", "--traceback"])
    with pytest.raises(ValueError, match="nowhere"):
        main(["data", "inspect", "nowhere", "--traceback"])
    with pytest.raises(ValueError, match="nowhere"):
        main(["data", "--traceback", "inspect", "nowhere"])


def test_a_failed_run_is_one_line_and_exit_code_1(tmp_path, data, capsys):
    command = [
        "train",
        "--recipe=dcgan-28",
        f"--data={data}",
        f"--out={tmp_path / 'run'}",
        "--steps=50",
        "--quiet",
    ]
    assert main([*command, *SMALL, "--set=d_lr=1e30", "--set=g_lr=1e30"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "must be finite" in error and "no checkpoint had been saved" in error


def test_ctrl_c_saves_and_exits_with_130(tmp_path, data):
    """A process of its own, as a user would interrupt it."""
    out = tmp_path / "run"
    command = ["train", "--recipe=dcgan-28", f"--data={data}", f"--out={out}", "--steps=1000000", *SMALL]
    # A shell's background job ignores Ctrl-C, and so would its children: the run here always hears it.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        [sys.executable, "-m", "fastgan.cli", *command], stdout=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        assert process.stdout is not None
        while "step 1/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(60) == 130
    (step,) = checkpoint.list_steps(out / "checkpoints")
    assert f"interrupted: step {step}, " in rest and f"go on with: fastgan train --resume {out}" in rest


def test_help_and_version(capsys):
    for command in ("train", "sample", "interpolate", "data", "doctor"):
        assert main([command, "--help"]) == 0
        assert f"usage: fastgan {command}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fastgan.__version__
    assert main([]) == 2


# ---------------------------------------------------------------------------------------------- progress


def test_live_display(capsys):
    """Drawn to something that is no terminal: rich then prints the last state once."""
    live = progress.LiveProgress()
    live.start(0, 10)
    live.tick(5)
    live.log({"step": 5, "images_per_second": 1234.4, "d_loss": 0.5, "d_real": 0.25, "seconds_left": 61})
    live.note("a note [with brackets]")
    live.warn("a warning")
    live.stop()
    shown = capsys.readouterr().out
    for text in (
        "images/s",
        "1,234",
        "0.500",
        "D(x)",
        "0.250",
        "5/10",
        "left 1:01",
        "[with brackets]",
        "warning: a",
    ):
        assert text in shown, text


def test_durations_and_memory():
    assert [progress.duration(s) for s in (0, 61.4, 3661, -5)] == ["0:00", "1:01", "1:01:01", "0:00"]
    assert 10 < progress.memory_mb(torch.device("cpu")) < 1e6


# ------------------------------------------------------------------------------------------------ doctor


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["threads"] == torch.get_num_threads()
    assert found["native"]["available"] and "usable" in found["native"]["tables"].values()
    assert found["cuda"]["available"] == torch.cuda.is_available()
    assert found["cuda"]["available"] or found["cuda"]["reason"]
    assert found["backends"]["bn_act"]["reference"] == {"available": True, "reason": ""}
    assert all(s["available"] or s["reason"] for op in found["backends"].values() for s in op.values())
    assert found["cache"]["path"] == os.environ["FASTGAN_CACHE"]
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for title in ("versions", "machine", "native core", "backends", "why not", "optional packages"):
        assert title in shown


def test_doctor_survives_what_is_broken(monkeypatch, capsys):
    """It reports a part that fails, and the others all the same."""

    def broken(*args):
        raise OSError("the disk is on fire")

    module = sys.modules["fastgan.doctor"]
    monkeypatch.setattr(module, "native", lambda: (None, "not built: no compiler"))
    monkeypatch.setattr(module, "cache_dir", broken)
    monkeypatch.setattr(module, "backends", broken)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    found = fastgan.doctor()
    assert found["native"] == {"available": False, "reason": "not built: no compiler"}
    assert found["cache"] == {"error": "OSError: the disk is on fire"} == found["backends"]
    assert not found["extras"]["imageio_ffmpeg"]["available"] and found["machine"] == machine()
    assert main(["doctor"]) == 0
    assert "the disk is on fire" in capsys.readouterr().out


def test_doctor_proves_and_fails_where_a_proof_does(monkeypatch, capsys):
    assert main(["doctor", "--prove", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["proofs"]
    assert {row["op"] for row in rows} >= {"conv2d", "bn_act", "gan_loss"} and not any(row["error"] for row in rows)
    wrong = {"op": "conv2d", "backend": "native", "dtype": "float32", "layout": "channels_last", "error": "off by one"}
    monkeypatch.setattr(sys.modules["fastgan.doctor"], "prove_all", lambda: [wrong])
    assert main(["doctor", "--prove"]) == 1
    assert "off by one" in capsys.readouterr().out


# ---- wrong values of every option -----------------------------------------------------------------------------------

WRONG = ["", "rivers", "-1", "0", "nan", "1e999", "9" * 30, "a\0b", "é/ü", "1.5", "[]"]
COMMANDS = {  # a right command each; that of train says what it would do
    "train": ["--recipe=dcgan-28", "--data=DATA", "--out=new", "--dry-run", *SMALL],
    "sample": ["--run=RUN", "--out=s.png", "--n=1"],
    "translate": ["--run=RUN", "--input=.", "--out=t"],
    "interpolate": ["--run=RUN", "--out=w.png", "--frames=2", "--walks=1", "--stops=2"],
    "evaluate": ["--run=RUN", "--n=4"],
    "report": ["RUN"],
    "watch": ["RUN"],
    "bench": ["op"],
    "profile": ["--recipe=dcgan-28"],
    "export": ["--run=RUN", "--format=onnx", "--out=m.onnx"],
}


def options(command):
    """The actions of a command's options that take a value."""
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [a for a in subparsers.choices[command]._actions if a.option_strings and a.nargs != 0]


def refuses(action, text):
    """Whether the option's own type or choices refuse a text."""
    try:
        value = action.type(text) if action.type else text
    except (argparse.ArgumentTypeError, ValueError):
        return True
    return action.choices is not None and value not in action.choices


def refused(command, action, text, capsys):
    """Whether a command ends for an option's value, in a sentence; it must do that or go well."""
    code = main([*command, f"{action.option_strings[0]}={text}"])
    said = capsys.readouterr().err
    assert code in (0, 2), (command, action.dest, text, said)
    if code:
        assert said.startswith("fastgan") and said.count("\n") == 1 and "Error" not in said, (action.dest, text, said)
    return code == 2, said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_with_a_type_refuses_what_is_none(command, capsys):
    found = [(a, text) for a in options(command) for text in WRONG if refuses(a, text)]
    assert found or command in ("report",)
    for action, text in found:
        ended, said = refused([command, *COMMANDS[command]], action, text, capsys)
        assert ended and action.option_strings[0] in said, (action.dest, text, said)


CONTRADICTIONS = {
    "--allow-changed-data": "--allow-changed-data is for a run that goes on, by --resume or --continue",
    "--continue --batch-size=auto": "--continue goes with --out alone",
    "--continue --overwrite": "--continue goes with --out alone",
    "--steps=3 --set steps=4": "--steps and --set steps say one thing twice, leave one out",
    "--eval-every=3 --set eval_every=3": "--eval-every and --set eval_every say one thing twice, leave one out",
    "--dry-run --target=kcd<1": "need evaluations, set eval_every",
    "--dry-run --eval-every=1 --target=nope": "target must read NAME<NUMBER",
    "--dry-run --patience=1": "need evaluations, set eval_every",
    "--dry-run --eval-every=1 --plateau=2": "plateau must be at least 4, got 2",
    "--set steps=1e30": "steps must be below 2^63",
    "--set log_every=1e30": "log_every must be below 2^63",
    "--set d_steps=1e9": "the samples of d_steps=1000000000 at batch size 4 must fit in memory",
    "--set domain_options.stream=3": "domain_options.stream must be true or false, got 3",
    "--set domain=clips": "dcgan-28 must make what this recipe says of clips, [8, 1, 8, 8], it makes [1, 8, 8]",
    "--set domain=clips --set domain_options.frames=1.5": "domain_options.frames must be a whole number, got 1.5",
    "--set domain=pairs": "dcgan-28 at batch size 4 must fit pairs",
    "--set model=wavegan --set model_options={}": "wavegan must make what this recipe says of images, [1, 8, 8], it",
    "--backend=cuda": "backend: cuda must be available, got none",
}


@pytest.mark.parametrize("options", CONTRADICTIONS)
def test_what_cannot_be_meant_together_is_refused_before_anything_is_done(options, data, tmp_path, monkeypatch, capsys):
    """Where a run would write, a plan would be measured and a batch size chosen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgan.cli.train.chosen_batch", lambda *args, **kwargs: pytest.fail("measured"))
    if "clips" in options:
        frames = torch.zeros(2, 8, 1, 8, 8, dtype=torch.uint8)
        monkeypatch.setattr("fastgan.domains.clips.load_clips", lambda *args, **kwargs: ClipSet(frames))
    assert main(["train", "--recipe=dcgan-28", f"--data={data}", "--out=new", *SMALL, *options.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("fastgan: ") and shown.err.count("\n") == 1 and CONTRADICTIONS[options] in shown.err
    assert not list(tmp_path.iterdir())


def test_home_is_found_where_a_shell_leaves_it(data, tmp_path, monkeypatch):
    """bash gives --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe=dcgan-28", f"--data={data}", "--out=~/runs/a", "--steps=1", *SMALL]) == 0
    assert (tmp_path / "runs/a/config.json").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("command", ["train", "sample", "interpolate", "evaluate"])
def test_every_other_option_takes_a_wrong_value_or_says_why_not(command, run, data, tmp_path, monkeypatch, capsys):
    """wandb's project may have any name; a file may be called anything that the system takes."""
    monkeypatch.chdir(tmp_path)
    right = [text.replace("RUN", str(run)).replace("DATA", data) for text in COMMANDS[command]]
    for action in options(command):
        if action.type or action.choices or action.dest == "wandb":
            continue
        for text in ("", "rivers", "a\0b", "9" * 30):
            ended, said = refused([command, *right], action, text, capsys)
            assert ended or text != "", (action.dest, said)
