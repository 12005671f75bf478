"""Clips: films and what is wrong with them, how their motion is judged, and the recipe `clip-32`."""

import numpy as np
import pytest
import torch
from PIL import Image

import fastgan
from fastgan.cli import main
from fastgan.data.clips import load_clips, moving_garments
from fastgan.domains import domain_of
from fastgan.domains.clips import motion_pictures
from fastgan.metrics import features, kernel_distance
from fastgan.models.clip import TemporalShift

SMALL = fastgan.recipes()["clip-32"].replace(
    model_options={"g_width": 4, "d_width": 4},
    domain_options={"frames": 4},
    **dict(
        image_size=16, batch_size=4, steps=4, eval_every=2, log_every=1, sample_count=4, ema_half_life=None, ema=0.9
    ),
)


def frames(count, seed=0):
    """Grey pictures of 20x16 whose brightness says which frame they are."""
    return [Image.fromarray(np.full((16, 20), 10 * k + seed, np.uint8)) for k in range(count)]


def test_films_are_read_and_what_is_wrong_is_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    first, *rest = frames(9)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    (tmp_path / "b").mkdir()
    for k, picture in enumerate(frames(5, seed=100)):
        picture.save(tmp_path / "b" / f"{k}.png")
    frames(1)[0].save(tmp_path / "still.gif")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    (tmp_path / "film.mp4").write_bytes(b"no film")
    (tmp_path / "notes.txt").write_text("not counted")
    clips = load_clips(str(tmp_path), frames=4, image_size=8, channels=1)
    assert clips.values.shape == (5, 4, 1, 8, 8)
    shades = clips.values[:, :, 0, 4, 4].tolist()
    assert shades[:3] == [[0, 10, 20, 30], [40, 50, 60, 70], [50, 60, 70, 80]]  # no frame is lost
    assert shades[3:] == [[100, 110, 120, 130], [110, 120, 130, 140]]
    said = dict(clips.skipped)
    assert said.keys() == {"still.gif", "broken.gif", "film.mp4"} and len(caplog.records) == 1
    assert said["still.gif"] == "it has 1 of 4 frames" and "pip install imageio-ffmpeg" in said["film.mp4"]
    picked = clips.pick(torch.tensor([3, 0]), mirror=torch.tensor([True, False]))
    assert picked.dtype == torch.float32 and picked[1, 3, 0, 0, 0].item() == pytest.approx(30 / 127.5 - 1)


def test_clips_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_clips(str(tmp_path / "nowhere"), frames=4, image_size=8, channels=1)
    frames(1)[0].save(tmp_path / "still.gif")
    with pytest.raises(
        ValueError, match=r"must hold a clip of 4 frames, it holds none; still.gif: it has 1 of 4 frames"
    ):
        load_clips(str(tmp_path), frames=4, image_size=8, channels=1)


def test_the_demonstration_moves_and_stays_inside():
    clips = moving_garments(8, 32, 1, 30)
    assert torch.equal(clips, moving_garments(8, 32, 1, 30)) and clips.shape == (30, 8, 1, 32, 32)
    light = clips.flatten(2).float().sum(2)
    assert torch.equal(light, light[:, :1].expand(-1, 8))  # the whole garment is in every frame
    assert (clips[:, 1:] != clips[:, :-1]).flatten(2).any(2).float().mean() > 0.95


def test_the_metric_sees_looks_and_motion():
    clips = moving_garments(8, 32, 1, 400).float() / 127.5 - 1
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    look = lambda some: features(motion_pictures(some))
    half, other = clips[order[:200]], clips[order[200:]]
    real = look(half)
    frozen = other[:, :1].expand(-1, 8, -1, -1, -1)
    mixed = torch.stack([clip[torch.randperm(8)] for clip in other])
    near, still, jumping = (kernel_distance(real, look(x)) for x in (other, frozen, mixed))
    assert abs(near) < 0.02 and still > 0.1 and jumping > 5 * abs(near)
    assert motion_pictures(torch.rand(2, 8, 3, 5, 5)).shape == (2, 3, 5, 5)


def test_temporal_shift_by_hand():
    x = torch.arange(2 * 3 * 16.0).view(6, 16, 1, 1)  # 2 clips of 3 frames, 16 channels
    y = TemporalShift(3)(x).view(2, 3, 16)
    x = x.view(2, 3, 16)
    assert torch.equal(y[:, :2, :2], x[:, 1:, :2]) and not y[:, 2, :2].any()
    assert torch.equal(y[:, 1:, 2:4], x[:, :2, 2:4]) and not y[:, 0, 2:4].any()
    assert torch.equal(y[:, :, 4:], x[:, :, 4:])


def test_the_discriminator_of_clip_32_keeps_what_tells_clips_apart():
    """With deviations of 0.02 and no norm it came down to 0.006 of different pictures at the logits."""
    torch.manual_seed(0)
    _, discriminator = fastgan.models.build("clip-32")
    with torch.no_grad():
        x = torch.rand(32, 1, 32, 32) * 2 - 1
        for layer in discriminator.main:
            x = layer(x)
            assert x.std(0).mean() > 0.1


@pytest.mark.usefixtures("unraced")
def test_clip_32_trains_resumes_reports_and_writes_gifs(tmp_path, capsys):
    run = tmp_path / "run"
    trainer = fastgan.Trainer(SMALL, out=run, device="cpu", quiet=True)
    assert trainer.fit().step == 4 and "kcd" in trainer.metrics
    page = (run / "report.html").read_text()
    assert page.count("data:image/gif") == 4 and (run / "pictures" / "real.gif").exists()
    out = tmp_path / "clips.gif"
    assert main(["sample", "--run", str(run), "--n", "4", "--out", str(out)]) == 0
    with Image.open(out) as moving:
        assert moving.n_frames == 4 and moving.size == (2 * 17 * 4 + 4, 2 * 17 * 4 + 4)
    assert main(["sample", "--run", str(run), "--n", "4", "--out", str(tmp_path / "a.avi")]) == 2
    assert "must end in .gif, .mp4 or .png" in capsys.readouterr().err
    fastgan.Trainer(SMALL.replace(steps=2), out=tmp_path / "parts", device="cpu", quiet=True).fit()
    parts = fastgan.Trainer(SMALL, resume=tmp_path / "parts", quiet=True)
    parts.fit()
    for network in ("generator", "discriminator"):
        weights = (getattr(one, network).state_dict().values() for one in (trainer, parts))
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_settings_that_cannot_be_meant_of_clips():
    with pytest.raises(ValueError, match="augment must be off for clips"):
        domain_of(SMALL.with_settings(["augment=cutout"]))
    for wrong in ({"frames": 3}, {"frames": 1}, {"image_size": 24}, {"image_size": 8}):
        with pytest.raises(ValueError, match="must be a power of two of at least"):
            fastgan.models.build("clip-32", **wrong)


def test_clips_are_written_as_a_film(tmp_path, monkeypatch):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    domain = domain_of(SMALL)
    made = torch.linspace(-1, 1, 4).view(1, 4, 1, 1, 1).expand(3, -1, 1, 16, 16)
    domain.check_out(str(tmp_path / "clips.mp4"))
    domain.save(made, str(tmp_path / "clips.mp4"), 3)
    reader = ffmpeg.read_frames(str(tmp_path / "clips.mp4"))
    width, height = next(reader)["size"]
    shades = [np.frombuffer(raw, np.uint8).reshape(height, width, 3)[10, 10, 0] for raw in reader]
    assert len(shades) == 48 and width % 2 == height % 2 == 0
    assert np.abs(np.array(shades, int).reshape(12, 4) - [0, 85, 170, 255]).max() < 12


def test_a_film_names_the_package_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match="sample: mp4 needs the package imageio-ffmpeg"):
        domain_of(SMALL).check_out(str(tmp_path / "clips.mp4"))
