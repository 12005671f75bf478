"""Reports: charts, a run's page, runs compared, nearest images, the page that follows a run, TensorBoard, plans."""

from __future__ import annotations

import html.parser
import json
import sys
import threading
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TINY, noise, trainer

import fastgan
from fastgan.cli import main
from fastgan.cli.watch import serve
from fastgan.training import plan as planning
from fastgan.training.charts import MOST_POINTS, curves
from fastgan.training.nearest import compare_with_images
from fastgan.training.report import comparison, page
from fastgan.training.rundir import RunDirectory


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    recipe = TINY.replace(eval_every=2, sample_count=9, watch_every=2)
    with fastgan.backend("reference"):
        trainer(noise(), folder / "a", recipe).fit()
        trainer(noise(1), folder / "b", recipe.replace(g_lr=1e-3, name="<b>")).fit()
    return folder


class Balanced(html.parser.HTMLParser):
    """Raises where a tag is closed that is not open; counts tags."""

    VOID = ("meta", "img", "line", "polyline", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.count = [], {}
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_has_what_a_run_is_judged_by(runs):
    text = (runs / "a/report.html").read_text()
    tags = Balanced(text).count
    for title in ("Kernel distance", "Losses", "Mean scores", "Health", "Gradient norms", "Samples over time"):
        assert f"<h2>{title}</h2>" in text, title
    assert "Nearest training images" in text and "times as far from its nearest training image" in text
    assert tags["input"] == 1 and tags["img"] == 1 + 1 + 4 + 1  # latest, real, four grids, nearest
    assert "http" not in text and text.count('class="now"') == 1


def test_a_page_made_again_is_the_same(runs, capsys):
    before = (runs / "a/report.html").read_text()
    assert main(["report", str(runs / "a")]) == 0
    assert (runs / "a/report.html").read_text() == before
    assert json.loads((runs / "a/ending.json").read_text())["status"] == "all steps done"


def test_a_page_of_a_run_under_way(tmp_path):
    trainer(noise(), tmp_path / "run", TINY).fit()
    for name in ("ending.json", "report.html", "pictures/nearest.png"):
        (tmp_path / "run" / name).unlink()
    text = page(RunDirectory(tmp_path / "run"), refresh=7)
    Balanced(text)
    assert "not yet" in text and "<meta http-equiv='refresh' content='7'>" in text


def test_runs_side_by_side(runs, tmp_path, capsys):
    out = tmp_path / "both.html"
    assert main(["report", str(runs / "a"), str(runs / "b"), "--out", str(out)]) == 0
    text = out.read_text()
    Balanced(text)
    assert "&lt;b&gt;" in text and "<b>" not in text.replace("<b>0", "")  # names are no markup
    assert "<td>g_lr</td><td>0.0002</td><td>0.001</td>" in text and "<td>steps</td>" not in text
    assert text.count("<polyline") == 2 * 4 and text == comparison([RunDirectory(runs / n) for n in "ab"])


def test_runs_of_other_samples_are_compared_by_their_own_scores(runs, tmp_path):
    """Texts have n-grams, pairs the distance to their targets, sounds that of their spectrograms."""
    named, more = fastgan.recipes(), {"fastgan": "0", "backend": "reference", "models": "recipe"}
    told = {}
    for name, key, noun in (
        *(("chargan", "jsd4", "lines"), ("pix2pix", "l1", "pairs"), ("hifigan-small", "mel", "sounds")),
        *(("clip-32", "kcd", "clips"), ("cyclegan", "kcd", "pictures a side")),
    ):
        run = RunDirectory(tmp_path / name)
        run.begin({"recipe": named[name].to_dict(), "started": "now", "device": "cpu"} | more, 0)
        for step, score in ((100, 0.5), (200, 0.25), (300, 0.75)):
            record = {"step": step, "seconds": step / 10, "d_loss": 1.0, "images_per_second": 9.0}
            run.append(record | {key: score, "eval_images": 128})
        told[name] = run, f"<td>{key} 0.2500 at step 200, 128 {noun}</td>"
    for run, best in told.values():
        text = comparison([run, RunDirectory(runs / "a")])
        Balanced(text)
        assert best in text and text.count("<td>kcd ") == 1 + ("kcd" in best)
        assert text.count("<polyline") == 2 * 2 + 2 * 2  # each its own score over steps and seconds; two of both runs
    text = comparison([told["chargan"][0], told["pix2pix"][0], RunDirectory(runs / "a")])
    for title in ("N-grams", "Distance to the targets", "Kernel distance"):
        assert text.count(f"<h2>{title}</h2>") == 2, title
    assert "divergence of 4-grams from those of the lines, bits" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere must be a run directory"),
        (["RUNS/a", "RUNS/a"], "each run must be named once"),
        (["RUNS/a", "--out", "a.pdf"], "--out must end in .html, got a.pdf"),
    ],
)
def test_wrong_reports(runs, capsys, arguments, message):
    assert main(["report", *(a.replace("RUNS", str(runs)) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_curves():
    many = [(float(i), float(i % 7)) for i in range(10 * MOST_POINTS)]
    drawn = curves({"one": many, "<two>": [(0.0, 1.0), (5.0, 2.0)]})
    Balanced(drawn)
    assert drawn.count("<polyline") == 2 and "&lt;two&gt;" in drawn
    assert len(drawn.split('points="')[1].split('"')[0].split()) <= MOST_POINTS
    assert "fewer than two" in curves({"one": [(0.0, 1.0)]})


def test_nearest_images(tmp_path):
    images = torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = images[[3, 17, 8]].float() / 127.5 - 1
    said = compare_with_images(RunDirectory(tmp_path), images, made, None)
    assert said.startswith("a sample is 0.00 times as far")
    with Image.open(tmp_path / "pictures/nearest.png") as sheet:
        pixels = torch.from_numpy(np.array(sheet))
    assert torch.equal(pixels[2:18], pixels[20:36])  # each image below its sample


# ---- following a run ----


def test_watch_answers_this_machine_alone(runs):
    with serve(RunDirectory(runs / "a"), 0, 3) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        assert server.server_address[0] == "127.0.0.1"
        with urllib.request.urlopen(url) as answer:
            assert "content='3'" in answer.read().decode()
        for asked, code in (
            (urllib.request.Request(f"{url}config.json"), 404),
            (urllib.request.Request(url, headers={"Host": "evil.example:80"}), 403),
        ):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(asked)
            assert error.value.code == code
            error.value.close()
        server.shutdown()
        thread.join()


def test_wrong_watching(runs, capsys):
    assert main(["watch", "nowhere"]) == 2
    assert main(["watch", str(runs / "a"), "--port", "70000"]) == 2
    assert "--port must be free and below 65536, 70000 is not" in capsys.readouterr().err


def test_tensorboard_gets_every_record(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(("folder", folder))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def add_image(self, name, image, step):
            written.append((name, step, image.shape[0]))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    run = trainer(noise(), tmp_path / "run", TINY, tensorboard=True)
    assert not written  # nothing before the run begins
    run.fit()
    assert written[0] == ("folder", str(tmp_path / "run/tensorboard")) and written[-1] == "closed"
    assert [("d_loss", step) in written for step in range(1, 7)] == [True] * 6 and ("samples", 4, 1) in written


def test_tensorboard_that_is_absent(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = ["train", "--recipe", "mlp-28", "--out", str(tmp_path / "run"), "--tensorboard"]
    assert main(arguments) == 2
    assert "--tensorboard needs the package tensorboard" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_wandb_gets_every_record(tmp_path, monkeypatch):
    written = []

    class Run:
        def log(self, numbers, step):
            written.append((step, *sorted(numbers)))

        def finish(self):
            written.append("finished")

    def init(**options):
        written.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Image=lambda sheet: sheet.shape))
    run = trainer(noise(), tmp_path / "run", TINY, wandb="garments")
    assert not written  # nothing before the run begins
    run.fit()
    begun = written[0]
    assert begun["project"] == "garments" and begun["name"] == "run" and begun["dir"] == str(tmp_path / "run")
    assert begun["config"] == run.config["recipe"] and begun["id"] == run.config["run"] and begun["resume"] == "allow"
    logged = [entry for entry in written[1:-1] if len(entry) > 2]
    assert [entry[0] for entry in logged] == list(range(1, 7)) and all("d_loss" in entry for entry in logged)
    assert (4, "samples") in written and written[-1] == "finished"


def test_wandb_that_is_absent_or_has_no_project(tmp_path, monkeypatch, capsys):
    arguments = ["train", "--recipe", "mlp-28", "--out", str(tmp_path / "run"), "--wandb"]
    assert main([*arguments, " "]) == 2
    assert "--wandb must be neither empty" in capsys.readouterr().err
    with pytest.raises(ValueError, match="training: --wandb must name a project, got ''"):
        trainer(noise(), tmp_path / "run", TINY, wandb="")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*arguments, "garments"]) == 2
    assert "--wandb needs the package wandb" in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---- plans ----


def test_the_batch_size_is_the_last_that_gains(monkeypatch, capsys):
    speed = {8: 100.0, 16: 180.0, 32: 300.0, 64: 310.0, 128: 900.0}
    monkeypatch.setattr(
        planning, "measure", lambda recipe, device: {"seconds": recipe.batch_size / speed[recipe.batch_size]}
    )
    assert planning.chosen_batch(TINY, device="cpu").batch_size == 32
    assert "batch size 64: 310 images/s" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_not_tried(monkeypatch):
    def measure(recipe, device):
        if recipe.batch_size > 16:
            raise ValueError("too much")
        return {"seconds": 1.0}

    monkeypatch.setattr(planning, "measure", measure)
    assert planning.chosen_batch(TINY, device="cpu").batch_size == 16


def test_the_plan_says_what_the_disk_must_hold(tmp_path):
    run = trainer(noise(), tmp_path / "run", TINY.replace(model_options={"g_width": 32, "d_width": 32}))
    counts = {
        n: sum(p.numel() for p in m.parameters())
        for n, m in (("generator", run.generator), ("discriminator", run.discriminator))
    }
    run.fit()
    kept = sum(p.stat().st_size for p in (tmp_path / "run/checkpoints").iterdir()) / 1e6
    assert planning._disk(run.recipe, counts) == pytest.approx(kept, rel=0.15)


def test_auto_is_for_new_runs(runs, capsys):
    assert main(["train", "--resume", str(runs / "a"), "--batch-size", "auto"]) == 2
    assert "--batch-size auto is for a new run" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["train", "--recipe", "mlp-28", "--batch-size", "some", "--out", "x"]) == 2
    assert "must be auto or a whole number of at least 1, got 'some'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.002, "2,000 images/s"), (8.0, "0.5 images/s"), (90.0, "0.04 images/s")]
)
def test_the_plan_of_slow_steps_and_of_evaluations(seconds, said, monkeypatch):
    counts = {"generator": 10, "discriminator": 10}
    found = {"seconds": seconds, "timed": 5, "memory_mb": 1.0, "parameters": counts}
    monkeypatch.setattr(planning, "measure", lambda recipe, device: found)
    text = planning.plan(TINY.replace(steps=1000), device="cpu")
    assert said in text and "evaluations" not in text
    text = planning.plan(TINY.replace(steps=1000, eval_every=200), device="cpu")
    assert "for 1,000 steps; 5 evaluations on top, about 5% more, or what 64 images each take" in text
