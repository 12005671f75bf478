"""A folder of grey images is trained with one channel unless the user says otherwise."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from fastgan import data
from fastgan.cli import main


@pytest.fixture
def folder(tmp_path):
    """Five pictures, grey in pixels, of three modes."""
    (tmp_path / "pictures").mkdir()
    for k in range(5):
        grey = Image.effect_noise((20, 16), 40 + k)
        grey.convert(("L", "RGB", "RGBA")[k % 3]).save(tmp_path / "pictures" / f"{k}.png")
    return tmp_path / "pictures"


def test_all_grey(folder, tmp_path):
    assert data.all_grey(folder)
    (folder / "5.png").write_text("no picture")
    assert data.all_grey(folder)
    Image.new("RGB", (9, 9), (10, 10, 11)).save(folder / "6.png")
    assert not data.all_grey(folder)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_text("no picture")
    assert not data.all_grey(tmp_path / "broken")
    assert data.all_grey("fashion-mnist") and not data.all_grey("emoji-64")
    assert data.all_grey(torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert not data.all_grey(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="does not exist"):
        data.all_grey(tmp_path / "nowhere")


def test_all_grey_ends_at_the_first_colour(folder, monkeypatch):
    """Of 400 pictures whose first is coloured a few are decoded, as many as are under way."""
    opened = []
    for k in range(400):
        (folder / f"z{k}.png").write_bytes((folder / "0.png").read_bytes())
    Image.new("RGB", (9, 9), (200, 0, 0)).save(folder / "0.png")
    real = data.loading.Folder.open
    monkeypatch.setattr(data.loading.Folder, "open", lambda self, name: opened.append(name) or real(self, name))
    assert not data.all_grey(folder) and len(opened) < 200


def plan(folder, capsys, *options):
    small = ["--set", "image_size=16", "--batch-size=4", "--set", "model_options.g_width=8"]
    assert main(["train", "--data", str(folder), "--dry-run", *small, *options]) == 0
    return capsys.readouterr().out


def test_the_command_takes_one_channel_and_says_so(folder, capsys):
    shown = plan(folder, capsys)
    assert f"every image of {folder} is grey: channels=1 (--set channels=3 for three)" in shown
    assert shown.partition("\nchannels ")[2].split()[0] == "1"
    assert "is grey" not in plan(folder, capsys, "--set", "channels=3")
    Image.new("RGB", (9, 9), (200, 0, 0)).save(folder / "red.png")
    assert "is grey" not in plan(folder, capsys)
