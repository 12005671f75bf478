"""Every script of examples/ runs, in a short form, and leaves the pictures that it promises."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="installed without the source tree")


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_convert_your_model_keeps_keys_and_numbers():
    said = run("convert_your_model.py")
    assert "same keys:          True" in said
    assert float(said.split("largest difference:")[1]) < 1e-4


def test_tour_leaves_its_pictures(tmp_path):
    said = run("tour.py", "--out", tmp_path, "--steps", 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    snapshots = ["4-step-00001.png", "4-step-00002.png"]
    assert names == ["1-real.png", "3-untrained.png", *snapshots, "5-average.png", "6-walk.png"]
    with Image.open(tmp_path / "6-walk.png") as walk:
        assert walk.size == (10 * 30 + 2, 8 * 30 + 2)
    assert "step 2: D " in said and "R1 penalty" in said


def test_concepts_draws_its_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib (pip install -e '.[plot]')")
    run("concepts.py", "--out", tmp_path, "--effort", 0.004)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {f"concepts-{name}" for name in ("orbits", "game", "regularisers", "garments")}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("residual_sngan.py", ["--width", 4]),
        ("pix2pix.py", ["--width", 2]),
        ("vocoder.py", ["--width", 16, "--samples", 2048]),
        ("wgan_gp.py", ["--width", 2]),
        ("dcgan.py", ["--width", 2]),
    ],
)
def test_other_peoples_networks_train_as_they_do_without_fastgan(name, size, capsys, monkeypatch):
    losses = []
    for plain in ([], ["--plain"]):
        monkeypatch.setattr(sys, "argv", [name, "--steps", "3", *map(str, size), *plain])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        said = re.findall(r"D (\S+)  G (\S+)", capsys.readouterr().out)
        losses.append([float(value) for step in said for value in step])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.skipif(not importlib.util.find_spec("pytorch_lightning"), reason="pip install -e '.[lightning]'")
def test_a_lightning_module_trains_as_it_does_without_fastgan():
    losses = []
    for plain in ([], ["--plain"]):
        command = [sys.executable, str(EXAMPLES / "lightning_module.py"), "--steps=2", "--width=2", *plain]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        losses.append([float(value) for step in re.findall(r"D (\S+)  G (\S+)", done.stdout) for value in step])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_without_lightning_its_example_says_so_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(SystemExit, match=r"needs Lightning .*pip install"):
        runpy.run_path(str(EXAMPLES / "lightning_module.py"), run_name="__main__")


def test_time_to_quality_measures_both(tmp_path):
    script = EXAMPLES.parent / "benchmarks" / "time_to_quality.py"
    out = tmp_path / "found.json"
    options = ["--seeds=1", "--limit=60", "--every=1", "--target=1000", f"--json={out}"]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [(r["arm"], r["steps"]) for r in found["times"]] == [
        (arm, 1) for arm in ("PyTorch", "fastgan", "fastgan auto")
    ]
    assert "over 1 of 1 seeds, PyTorch takes" in found["verdict"] and found["verdict"] in done.stdout
