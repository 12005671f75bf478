"""fastgan bench: every kind of work on tiny shapes, what it writes, what it refuses, and what it does not rank."""

import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import fastgan
from fastgan.benchmarking import table, workloads
from fastgan.benchmarking.comparison import difference
from fastgan.benchmarking.textbook import textbook_step
from fastgan.cli import bench, main

CPU = torch.device("cpu")
FAST = ["--device=cpu", "--seconds=0.01"]
EAGER = "--against=eager,eager-channels_last"
IMAGES = "--shape=2x3x16x16"


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


def measured(tmp_path, *arguments, code=0):
    """What the command writes as JSON."""
    path = tmp_path / "bench.json"
    assert main(["bench", *arguments, *FAST, f"--json={path}"]) == code
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "arguments, cases",
    [
        (["step", IMAGES, EAGER], ["dcgan-64-2x3x16x16"]),
        (["penalty", IMAGES, EAGER], ["r1 of r1-dcgan-64-2x3x16x16", "wgan-gp of wgan-gp-64-2x3x16x16"]),
        (["sample", IMAGES, EAGER], ["dcgan-64-2x3x16x16"]),
        (
            ["op", "--shape=conv2d:2x3x9x9:4,3,2,1:leaky_relu", "--shape=gan_loss:5", EAGER],
            ["conv2d:2x3x9x9:4,3,2,1:leaky_relu-forward+backward", "gan_loss:5-forward+backward"],
        ),
    ],
    ids=["step", "penalty", "sample", "op"],
)
def test_every_kind_of_work(arguments, cases, tmp_path, capsys):
    found = measured(tmp_path, *arguments)
    assert [case["id"] for case in found["cases"]] == cases
    for case in found["cases"]:
        rows = [row["row"] for row in case["rows"]]
        assert rows == ["eager", *(["eager-channels_last"] if "gan_loss" not in case["id"] else []), "fastgan"]
        assert all(len(row["samples_s"]) >= 5 and row["median_s"] > 0 and not row["failed"] for row in case["rows"])
        assert case["rows"][-1]["ours"] and case["rows"][-1]["speedup"] > 0
    assert {"cpu", "threads", "torch", "fastgan", "kernels", "date", "load_before", "load_after"} <= set(
        found["machine"]
    )
    shown = capsys.readouterr().out
    assert "vs PyTorch" in shown and "PyTorch's best in float32" in shown


def test_all_precisions(tmp_path):
    rows = measured(tmp_path, "op", "--shape=bn_act:4x3x4x4:relu", "--precision=all", "--against=bf16")["cases"][0][
        "rows"
    ]
    assert [(row["row"], row["dtype"]) for row in rows] == [
        ("bf16", "bfloat16"),
        ("fastgan", "float32"),
        ("fastgan-bf16", "bfloat16"),
    ]
    assert rows[1]["speedup"] is None and rows[2]["best_pytorch"] == "bf16"  # nothing of float32 to compare with
    assert [row.name for row in workloads.rows(["fp16"])] == ["fp16", "compile-fp16", "fastgan-fp16"]


SMALL = {"mlp-28": {}, "sngan-32": {"g_width": 8, "d_width": 8}, "r3gan-small": {"g_width": 16, "d_width": 16}}
SMALL["r3gan"] = SMALL["r3gan-small"]
SMALL["chargan"] = {"width": 8, "blocks": 1}
SMALL |= {"sagan-32": {"g_width": 8, "d_width": 8}, "vit-gan-small": {"g_width": 4, "d_width": 8, "depth": 1}}
SMALL["hifigan-small"] = {"g_width": 8, "d_width": 4}
SMALL["cyclegan"] = {"g_width": 4, "d_width": 4, "blocks": 1}
KINDS = [*fastgan.recipes(), "dragan", "r1-approximate", "r2-approximate"]


@pytest.mark.parametrize("name", KINDS)
def test_the_textbook_step_of_every_recipe_is_gansteps(name):
    recipe = fastgan.recipes()[name if name in fastgan.recipes() else "dcgan-28"]
    options = SMALL.get(name, {"g_width": 4, "d_width": 4})
    recipe = recipe.replace(batch_size=4, model_options={**recipe.model_options, **options})
    if name not in fastgan.recipes():  # a penalty that no recipe has
        recipe = recipe.replace(penalty=name, penalty_every=2, penalty_sigma=0.1, loss="lsgan")
    torch.manual_seed(0)
    work = workloads.step(recipe, CPU)
    want = work.build(workloads.PLAIN)[1]()
    for row in workloads.rows(["fp32"]):
        if not row.compile:
            got = work.build(row)[1]()
            assert all(difference(got[part], want[part]) < work.tolerances[0] for part in want)
    assert len(want["the losses"]) == 2 + (recipe.penalty is not None)
    assert all(want[f"{network}'s gradient"].norm() > 0 for network in "GD")


def test_one_batch_serves_all_updates_of_the_textbook_step():
    """As GANStep takes it; indexed as a sequence, it would be single images."""
    recipe = fastgan.recipes()["mlp-28"].replace(d_steps=2)
    images = torch.rand(4, 1, 28, 28)
    found = []
    for real in (images, [images, images]):
        torch.manual_seed(0)
        networks = fastgan.models.build("mlp-28")
        adams = [torch.optim.Adam(m.parameters(), 1e-3) for m in networks]
        found.append(textbook_step(recipe, *networks, *adams)(real))
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_the_shapes_of_dcgan_64_are_cases():
    for spec in workloads.OP_SHAPES:
        assert str(workloads.op(spec, CPU).case).startswith(spec)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train"], "invalid choice: 'train' (choose from"),
        (["--against=eager,jax"], "takes eager, eager-channels_last, compile; got 'jax'"),
        (["--against=bf16"], "with --precision fp32 takes eager, eager-channels_last, compile; got 'bf16'"),
        (["--precision=fp64"], "invalid choice: 'fp64'"),
        (["--recipe=stylegan"], "there is no recipe 'stylegan', choose one of"),
        (["penalty", "--recipe=dcgan-64"], "penalty needs a recipe that has one, got dcgan-64"),
        (["--shape=2x3x16x32"], "must be one NxCxHxW of square images, such as 64x3x64x64, got 2x3x16x32"),
        (["--shape=2x3x16x16", "--batch-size=4"], "got 2x3x16x16 beside --batch-size"),
        (["--shape=2x3x17x17"], "image_size must be a power of two"),
        (["op", "--batch-size=4"], "op takes neither --recipe nor --batch-size"),
        (["op", "--shape=linear:2x3"], "--shape of op must read conv2d:NxCxHxW"),
        (["op", "--shape=conv2d:2x3x8x8"], "--shape of op must read conv2d:NxCxHxW"),
        (["op", "--shape=conv2d:2x3x8x8:4,3,1,1,1,0"], "--shape of op must read conv2d:NxCxHxW"),
        (["op", "--shape=conv2d:2x3x8x8:4,9"], "must be a case that PyTorch runs, got: "),
        (["--device=tpu"], "it must be auto, cpu or cuda"),
        (["--seconds=0"], "must be a number above 0"),
        (["--json=/nowhere/at/all.json"], "the directory of --json must exist"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "op", "--shape=gan_loss:5", f"--plot={tmp_path}/bench.png"]) == 2
    shown = capsys.readouterr()
    assert "pip install matplotlib" in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    measured(tmp_path, "op", "--shape=gan_loss:5", "--against=eager", f"--plot={tmp_path}/bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_numbers_are_named_and_not_ranked(tmp_path, monkeypatch, capsys):
    right = fastgan.functional.gan_loss
    monkeypatch.setattr(fastgan.functional, "gan_loss", lambda *args, **kind: 2 * right(*args, **kind))
    found = measured(tmp_path, "op", "--shape=gan_loss:5", "--against=eager", code=1)
    eager, ours = found["cases"][0]["rows"]
    assert eager["median_s"] and not eager["failed"]
    assert ours["median_s"] is None and ours["samples_s"] == [] and ours["speedup"] is None
    reason = "fastgan is not ranked: RuntimeError: the output must be eager float32's within 0.001, got an error of 1"
    assert reason in " ".join(capsys.readouterr().out.split())


def test_where_compiling_fails_the_row_says_why(tmp_path, monkeypatch, capsys):
    def compile(*args, **kind):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", compile)
    rows = measured(tmp_path, "op", "--shape=gan_loss:5")["cases"][0]["rows"]
    assert [bool(row["failed"]) for row in rows] == [False, True, False]
    assert "compile is not ranked: RuntimeError: no C++ compiler" in capsys.readouterr().out


def test_a_loss_is_shown_as_a_loss():
    row = dict(row="eager", failed="", median_s=1.0, q1_s=1.0, q3_s=1.0, first_call_s=1.0, peak_bytes=1, backends="")
    row |= dict(ours=False, speedup=1.0, best_pytorch="eager", dtype="float32")
    slow = row | dict(row="fastgan", ours=True, median_s=2.0, speedup=0.5, backends="native")
    shown = Console(file=io.StringIO(), width=120)
    bench._print(shown, dict(op="step", shape="s", direction="d", rows=[row, slow]))
    assert "0.50 (slower)" in shown.file.getvalue()
    assert (
        "fastgan: 0.50 times the speed of eager, PyTorch's best in float32, slower; ran on native"
        in shown.file.getvalue()
    )


@pytest.mark.slow
def test_compiled_rows_give_the_same_results(tmp_path):
    for arguments in (["step", IMAGES], ["penalty", IMAGES], ["sample", IMAGES], ["op", "--shape=bn_act:4x3x4x4:relu"]):
        for case in measured(tmp_path, *arguments, "--against=compile")["cases"]:
            assert [row["failed"] for row in case["rows"]] == ["", ""]


class Started(Exception):
    """In place of os.execve, which does not return."""


@pytest.mark.parametrize("name", table.LIMITS)
def test_a_table_starts_the_program_anew_with_pytorch_held_to_it(name, monkeypatch):
    """And the second time it chooses our table: `before` runs only in front of the new start."""
    module = pytest.importorskip("fastgan._C")
    refusal = module.tables().get(name, "not in this build")
    if refusal:
        with pytest.raises(ValueError, match="--table"):
            table.hold(name)
        return
    started, told = [], []

    def execve(path, arguments, environment):
        started.append((path, arguments, environment))
        raise Started

    monkeypatch.setattr(table.os, "execve", execve)
    for variable in table.LIMITS[name]:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(Started):
        table.hold(name, lambda: told.append(True))
    (path, arguments, environment) = started[0]
    assert path == arguments[0] == sys.executable and arguments[1:] == sys.orig_argv[1:] and told == [True]
    assert table.LIMITS[name].items() <= environment.items()
    for variable, value in table.LIMITS[name].items():
        monkeypatch.setenv(variable, value)
    try:
        table.hold(name, lambda: told.append(True))
        assert module.table() == name and told == [True]
    finally:
        module.use_table(None)


def test_an_unknown_table_is_refused(capsys):
    pytest.importorskip("fastgan._C")
    assert main(["bench", "--table", "sse9", *FAST]) == 2
    assert "--table must be one of portable" in capsys.readouterr().err


@pytest.mark.slow
def test_pytorch_and_fastgan_run_the_lower_table(tmp_path):
    """The whole way: a new process, whose record names the table, and where torch says what it was held to."""
    path = tmp_path / "bench.json"
    command = [
        sys.executable,
        "-m",
        "fastgan.cli",
        "bench",
        "op",
        "--shape=gan_loss:5",
        EAGER,
        *FAST,
        "--table=portable",
    ]
    done = subprocess.run([*command, f"--json={path}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text())["machine"]["kernels"] == "portable"
