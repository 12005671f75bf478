"""What cannot be meant, or cannot fit, is one sentence before anything is written or asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import fastgan
from fastgan.cli import main
from fastgan.training import needs
from fastgan.training.recipes import recipes
from fastgan.training.trainer import Trainer

SMALL = ["--backend=reference", "--device=cpu", "--steps=2", "--quiet", "--set=log_every=1"]
TINY = [
    *("--recipe=dcgan-28", *SMALL, "--batch-size=4", "--set=image_size=8", "--set=latent=5", "--set=sample_count=4"),
    *("--set=model_options.g_width=2", "--set=model_options.d_width=2"),
]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train RUN --recipe dcgan-64 --set model_options.g_width=1000000000000", "must have sizes that fit in memory"),
        ("train RUN --recipe dcgan-64 --set model_options.g_width=20000", "GiB and"),
        ("train RUN --recipe mlp-28 --set latent=1000000000000", "the weights of mlp-28 and their optimisers must fit"),
        (
            "train RUN --recipe mlp-28 --batch-size 1000000000",
            "a training step of mlp-28 at batch size 1000000000 must",
        ),
        ("train RUN --recipe mlp-28 --batch-size 1", "batch norm more than 1 value a channel"),
        ("train RUN --recipe mlp-28 --set sample_count=1000000000000", "latents: 1,000,000,000,000 of 100 numbers"),
        ("train RUN --recipe mlp-28 --set image_size=100000000", "one picture of 1 x 100000000 x 100000000 must fit"),
        ("train RUN --recipe mlp-28 --seed 18446744073709551616", "must be below 2^63"),
        ("train RUN --recipe mlp-28 --set seed=18446744073709551616", "seed must be below 2^63"),
        ("train RUN --recipe mlp-28 --set data=", "data must be neither empty"),
        ("train RUN --recipe mlp-28 --data=", "--data must be neither empty"),
        ("train RUN --recipe mlp-28 --device=", "--device must be neither empty"),
        ("train RUN --recipe mlp-28 --set=", "--set must be neither empty"),
        ("train RUN --recipe mlp-28 --data a\0b", "--data must be neither empty nor hold a NUL"),
        ("train --recipe mlp-28 --out=", "--out must be neither empty"),
        ("data prepare emoji-64 --image-size 100000000 --out x.npy", "one picture of 3 x 100000000 x 100000000 must"),
        ("data inspect EMPTY", "--source must be neither empty"),
        ("sample --run x --out y.png --seed 18446744073709551616", "must be below 2^63"),
    ],
)
def test_one_sentence_and_nothing_written(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    words = ["" if word == "EMPTY" else word for word in command.split(" ")]
    if "RUN" in words:
        words[words.index("RUN") : words.index("RUN") + 1] = [*SMALL, "--out=run"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and len(error) < 400 and "frame #" not in error
    assert not list(tmp_path.iterdir())


def test_every_recipe_fits_what_it_needs():
    before = torch.get_rng_state()
    for recipe in recipes().values():
        needs.check(recipe.replace(batch_size=2), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_empty_values_in_python(tmp_path):
    for wrong in ({"out": ""}, {"resume": ""}, {"out": tmp_path / "x", "device": ""}, {"out": "a\0b"}):
        with pytest.raises(ValueError):
            Trainer("mlp-28", **wrong)
    with pytest.raises(ValueError, match="source must be neither empty"):
        fastgan.data.load("")


def test_help_shows_whole_sources(capsys):
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for recipe in recipes().values():
        assert " ".join(recipe.source.split()) in shown


# ------------------------------------------------------------------------------------------ data that moved


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of two steps on twelve pictures in ./pictures, given by a relative path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "pictures" / f"{k:02}.png")
    assert main(["train", *TINY, "--data=pictures", "--out=run"]) == 0
    return tmp_path


def test_a_relative_path_is_found_from_anywhere(run, monkeypatch, capsys):
    (run / "elsewhere").mkdir()
    monkeypatch.chdir(run / "elsewhere")
    assert main(["train", "--resume", "../run", "--steps=3", "--quiet"]) == 0
    assert main(["evaluate", "--run", "../run", "--n=8", "--json"]) == 0
    config = json.loads((run / "run/config.json").read_text())
    assert config["recipe"]["data"] == str(run / "pictures") and config["images"]["count"] == 12


def test_images_that_moved_are_found_where_data_says(run, capsys):
    (run / "pictures").rename(run / "moved")
    assert main(["train", "--resume=run", "--steps=3", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert str(run / "pictures") in error and "--data PATH says where they are now" in error and error.count("\n") == 1
    assert main(["train", "--resume=run", "--steps=3", "--quiet", "--data=moved"]) == 0
    assert json.loads((run / "run/config.json").read_text())["recipe"]["data"] == str(run / "moved")


@pytest.mark.parametrize("change", ["a pixel", "a picture more"])
def test_images_that_changed_are_refused_unless_insisted_on(run, capsys, change):
    path = run / "pictures" / "05.png"
    if change == "a pixel":
        pixels = np.array(Image.open(path))
        pixels[3, 3] ^= 1
        Image.fromarray(pixels).save(path)
        said = "as many images, but other pixels or labels"
    else:
        Image.open(path).save(run / "pictures" / "99.png")
        said = "13 images and there were 12"
    resume = ["train", "--resume=run", "--steps=3", "--quiet"]
    assert main(resume) == 2
    error = capsys.readouterr().err
    assert said in error and "--allow-changed-data" in error and error.count("\n") == 1
    assert main([*resume, "--allow-changed-data"]) == 0


def test_names_that_the_locale_cannot_show(run):
    """Python's UTF-8 mode off, and ASCII as the locale."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    plain |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "fastgan.cli", "train", *TINY, "--data=pictures", "--out=gärten"]
    command.remove("--quiet")
    done = subprocess.run(command, env=plain, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (run / "gärten" / "report.html").exists()


# ----------------------------------------------------------------------------------- 12 bits in files of 16


def png_of_16_bits(path, pixels, bits=None):
    """A 16-bit grey PNG, with an sBIT chunk before its pixels where `bits` says so."""
    Image.fromarray(pixels).save(path)
    if bits is not None:
        content = path.read_bytes()
        body = b"sBIT" + bytes([bits])
        chunk = (1).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        path.write_bytes(content[:33] + chunk + content[33:])  # after the signature and IHDR


@pytest.mark.parametrize(
    ("white", "bits", "top"), [("sbit", 12, 4095), ("sbit", None, 65535), ("max", None, 4000), ("4095", None, 4095)]
)
def test_deep_greys_are_scaled_by_what_is_white(tmp_path, caplog, white, bits, top):
    values = np.linspace(0, 4000, 64).round().astype(np.uint16).reshape(8, 8)
    (tmp_path / "deep").mkdir()
    png_of_16_bits(tmp_path / "deep" / "a.png", values, bits)
    out = tmp_path / "deep.npy"
    options = ["--image-size=8", f"--white={white}"]
    assert main(["data", "prepare", str(tmp_path / "deep"), f"--out={out}", *options]) == 0
    want = np.rint(values.astype(np.float64) * 255 / top).astype(np.uint8)
    assert np.array_equal(fastgan.data.load(out).images[0, 0].numpy(), want)
    assert (want.max() > 240) == (top < 65535)
    assert ("white of 16-bit greys is 4,000" in caplog.text) == (white == "max")


def test_deep_greys_are_resized_before_they_are_rounded(tmp_path):
    rng = np.random.default_rng(0)
    values = (rng.integers(0, 2, (64, 64)) * 200).astype(np.uint16)  # 0 or 200: both are 0 or 1 of 255
    (tmp_path / "deep").mkdir()
    png_of_16_bits(tmp_path / "deep" / "a.png", values * 2)
    got = fastgan.data.load(tmp_path / "deep", image_size=8).images[0, 0].double()
    plain = Image.fromarray((values * 2 * (255.0 / 65535)).astype(np.float32)).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(got.numpy(), np.rint(np.asarray(plain)).clip(0, 255))


def test_deep_arrays(tmp_path):
    np.save(tmp_path / "deep.npy", np.full((2, 8, 8), 4095, np.uint16))
    for white, want in ((65535, 16), ("max", 255), (8190, 128)):
        fastgan.data.prepare(tmp_path / "deep.npy", tmp_path / "out.npy", white=white)
        assert int(fastgan.data.load(tmp_path / "out.npy").images[0, 0, 0, 0]) == want
    for wrong in (0, 65536, "most", True):
        with pytest.raises(ValueError, match='white must be "sbit", "max" or 1 to 65535'):
            fastgan.data.prepare(tmp_path / "deep.npy", tmp_path / "out.npy", white=wrong)


def test_labels_of_other_pictures_are_never_taken(tmp_path, monkeypatch):
    """Killed between the pictures and their labels, when both replace older ones."""
    for name, count in (("old", 6), ("new", 9)):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((count, 8, 8), np.uint8), labels=np.arange(count))
    out = tmp_path / "out.npy"
    fastgan.data.prepare(tmp_path / "old.npz", out)
    assert fastgan.data.load(out).labels.tolist() == list(range(6))

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fastgan.data.pixels"], "_write_card", killed)
    with pytest.raises(KeyboardInterrupt):
        fastgan.data.prepare(tmp_path / "new.npz", out)
    assert fastgan.data.load(out).labels.tolist() == list(range(6))  # nothing was replaced
    monkeypatch.undo()
    old = out.read_bytes()
    fastgan.data.prepare(tmp_path / "new.npz", out)
    out.write_bytes(old)  # as if killed between the two
    with pytest.raises(ValueError, match="must be as `prepare` wrote it"):
        fastgan.data.load(out)


@pytest.mark.parametrize("command", ["train --recipe mlp-28 --data NAME --out x", "data inspect NAME"])
def test_a_path_that_the_system_refuses(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main(command.replace("NAME", "a" * 300).split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "must be a path that can be used, the system says: File name too long" in error
    assert "characters)" in error and "Errno" not in error and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ as many as were asked for


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run without labels and one with."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", *TINY, "--data=emoji-64", f"--out={folder / 'plain'}"]) == 0
    assert main(["train", *TINY, "--data=emoji-64", "--conditional", f"--out={folder / 'labels'}"]) == 0
    return folder


@pytest.mark.parametrize("count", [10**12, 10**18])
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample --run plain --n COUNT --out x.png", "latents: "),
        ("sample --run labels --n COUNT --out x.png", "labels: "),
        ("sample --run labels --label 0 --n COUNT --out x.png", "labels: "),
        ("interpolate --run plain --frames COUNT --out x.gif", "interpolate: 9 walks of "),
        ("interpolate --run plain --stops COUNT --out x.gif", "latents: "),
        ("interpolate --run labels --walks COUNT --out x.gif", "interpolate: "),
        ("interpolate --run plain --along components --frames COUNT --out x.gif", "interpolate: "),
        ("train --conditional --data emoji-64 --out new --set sample_count=COUNT", "labels: "),
    ],
)
def test_more_pictures_than_memory_is_one_sentence(runs, monkeypatch, capsys, command, message, count):
    monkeypatch.chdir(runs)
    verb, *words = command.replace("COUNT", str(count)).split()
    assert main([verb, *(TINY if verb == "train" else ()), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "must fit in memory, it needs" in error
    assert sorted(p.name for p in runs.iterdir()) == ["labels", "plain"]


def test_a_gif_is_counted_before_its_pictures_are_made(runs, monkeypatch, capsys):
    """Its pictures are enlarged to 64 pixels and more, so the walks may fit where it does not."""
    monkeypatch.chdir(runs)
    monkeypatch.setattr("fastgan.data.memory.free_bytes", lambda device: 4000)
    assert main(["interpolate", "--run=plain", "--frames=3", "--walks=1", "--stops=2", "--out=x.gif"]) == 2
    assert "a GIF of 3 frames of" in capsys.readouterr().err and not (runs / "x.gif").exists()


def test_prepare_replaces_no_file_but_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    card = tmp_path / "set.json"
    for content in ('{"mine": 1}', "[1, 2]", "no json \xff"):
        card.write_bytes(content.encode("latin-1"))
        assert main(["data", "prepare", "emoji-64", "--limit=5", "--out=set.npy"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "set.json, where the labels go, must be of an earlier prepare" in error
        assert card.read_bytes() == content.encode("latin-1") and [p.name for p in tmp_path.iterdir()] == ["set.json"]
    card.unlink()
    for count in (5, 7):  # its own it does
        assert main(["data", "prepare", "emoji-64", f"--limit={count}", "--out=set.npy"]) == 0
        assert len(fastgan.data.load("set.npy").labels) == count
