"""The recipe `hifigan-small`: mel spectrograms, its losses and scores, and a run through trainer and command."""

import math
import wave

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import l1_loss

import fastgan
from fastgan.cli import main
from fastgan.data.sounds import load_sounds, save_wav
from fastgan.domains import domain_of
from fastgan.domains.mel import MelSpectrogram
from fastgan.domains.vocoder import SoundLoss
from fastgan.training.outputs import Outputs
from fastgan.training.sampling import load_generator

SMALL = fastgan.recipes()["hifigan-small"].replace(
    model_options={"g_width": 8, "d_width": 4},
    domain_options={"length": 512, "bands": 8},
    schedule="constant",  # a part of a run has its rates
    **dict(batch_size=4, steps=4, eval_every=2, log_every=1, sample_count=6, held_out=10),
)


def tone(frequency, rate=8000, length=2048):
    return torch.sin(2 * math.pi * frequency * torch.arange(length) / rate).view(1, 1, -1)


# ---- spectrograms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frequency", [200.0, 1000.0, 3100.0])
def test_a_tone_is_loudest_in_the_band_around_it(frequency):
    spectrogram = MelSpectrogram(8000, bands=40, hop=64)
    found = spectrogram(tone(frequency))
    assert found.shape == (1, 40, 32) and found.isfinite().all()
    mel = lambda f: 2595 * math.log10(1 + f / 700)
    assert abs(found[0, :, 16].argmax().item() + 1 - mel(frequency) / mel(4000) * 41) <= 1


def test_a_spectrogram_is_float32_under_autocast():
    spectrogram = MelSpectrogram(8000, bands=40, hop=64)
    with torch.autocast("cpu", torch.bfloat16):
        found = spectrogram(tone(700.0).bfloat16())
    assert torch.equal(found, spectrogram(tone(700.0).bfloat16()))


def test_silence_has_finite_derivatives():
    x = torch.zeros(2, 1, 512, requires_grad=True)
    MelSpectrogram(8000, bands=8, hop=64)(x).sum().backward()
    assert x.grad.isfinite().all()


def test_derivatives_of_a_spectrogram():
    spectrogram = MelSpectrogram(8000, bands=8, hop=64)
    torch.manual_seed(0)
    x, way = torch.randn(1, 1, 512) * 0.3, torch.randn(1, 1, 512)
    leaf = x.clone().requires_grad_()
    spectrogram(leaf).sum().backward()
    difference = (spectrogram(x + 1e-3 * way).double().sum() - spectrogram(x - 1e-3 * way).double().sum()) / 2e-3
    assert (leaf.grad * way).sum().item() == pytest.approx(difference.item(), rel=0.02)


def test_longer_windows_are_as_far_above_the_floor_and_tell_nearer_tones_apart():
    spectrogram = MelSpectrogram(8000, bands=40, hop=64, floor=0.01)
    assert spectrogram(torch.zeros(1, 1, 4096)).unique().item() == pytest.approx(math.log(0.01))
    above = []
    for share in (1.0, 4.0):
        look = spectrogram.with_windows(share)
        found = look(tone(1000.0, length=4096))
        assert found.shape == (1, 40 * share, 64 / share)
        above.append((found.max() - look(torch.zeros(1, 1, 4096)).max()).item())
    assert above[1] == pytest.approx(above[0], abs=0.3)
    lines = lambda look: look(tone(1000.0, length=4096) + tone(1060.0, length=4096))[0, :, 8]
    peaks = lambda found: int(((found[1:-1] > found[:-2] + 1) & (found[1:-1] > found[2:] + 1)).sum())
    assert peaks(lines(spectrogram.with_windows(4.0))) == 2 and peaks(lines(spectrogram)) <= 1
    with pytest.raises(ValueError, match=r"a resolution must leave whole numbers of hop 64 and 40 bands, got 0\.1"):
        spectrogram.with_windows(0.1)


# ---- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hop", "factors"), [(4, [4]), (64, [4, 4, 4]), (32, [4, 4, 2])])
def test_sounds_have_a_hop_a_frame(hop, factors):
    from fastgan.models.hifigan import factors_of

    generator, discriminator = fastgan.models.build("hifigan-small", bands=8, hop=hop, g_width=8, d_width=4)
    assert factors_of(hop) == factors
    sound = generator(torch.randn(2, 8, 9))
    assert sound.shape == (2, 1, 9 * hop) and sound.abs().max() <= 1
    logits, features = discriminator(torch.rand(2, 1, 509))
    assert len(logits) == len(features) == 8 and all(t.dim() == 2 and len(t) == 2 for t in logits)
    assert [f.shape[-1] for f in features[:5] for f in f[:1]] == [2, 3, 5, 7, 11]  # a column a place of the period


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hop": 48}, "hop must be a power of two of at least 4, got 48"),
        ({"g_width": 4}, "g_width must be at least 8 for hop 64, got 4"),
        ({"d_width": 6}, "d_width must be a multiple of 4, got 6"),
        ({"bands": 0}, "bands must be a positive integer"),
    ],
)
def test_sizes_that_are_none(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fastgan.models.build("hifigan-small", **options)


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_what_the_generator_learns_is_half_of_the_papers_terms():
    """LSGAN here has half of the paper's square, so the others have half of their weights."""
    domain = domain_of(SMALL)
    extra = domain.step(None, None)["extra_g_loss"]
    assert isinstance(extra, SoundLoss) and (extra.mel, extra.matching) == (22.5, 1.0)
    torch.manual_seed(0)
    _, discriminator = fastgan.models.build("hifigan-small", d_width=4)
    real, fake = torch.rand(2, 1, 512) - 0.5, torch.rand(2, 1, 512) - 0.5
    mel = domain.spectrogram
    d_real, d_fake = discriminator(real), discriminator(fake)
    found = extra(Outputs(real, fake, d_real, d_fake, None, mel(real)))
    layers = [(a, b) for a, b in zip(d_real[1], d_fake[1], strict=True) for a, b in zip(a, b, strict=True)]
    assert len(layers) == 40
    looks = [MelSpectrogram(8000, bands=bands, hop=bands * 8, floor=0.01 * (bands / 8) ** 2) for bands in (2, 8, 32)]
    want = sum(l1_loss(mel(fake), mel(real)) for mel in looks) * 22.5 / 3 + sum(l1_loss(a, b) for a, b in layers)
    torch.testing.assert_close(found, want)
    assert extra(Outputs(real, real, d_real, d_real, None, mel(real))).item() < 1e-4


def test_the_score_is_the_distance_of_spectrograms():
    sounds = load_sounds("drums", length=512)
    judge = domain_of(SMALL).judge(sounds.select(torch.arange(30)))
    real = sounds.pick(torch.arange(30))
    noisy = (real + 0.05 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    same, off = judge.score((real, real), 30), judge.score((noisy, real), 30)
    assert same["mel"] == 0 and same["kcd"] < 0 and off["mel"] > 0.5 and off["kcd"] > 0.5  # of pairs: below 0
    assert judge.score((real * torch.nan, real), 30) == {}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"instance_noise": 0.1}, "instance_noise must be 0"),
        ({"domain_options": {"length": 500}}, "length must be a multiple of hop 64, got 500"),
        ({"domain_options": {"length": 384}}, "length must be above 384 for these resolutions, got 384"),
        ({"domain_options": {"bands": 30}}, "must leave whole numbers of hop 64 and 30 bands, got 0.25"),
        ({"domain_options": {"resolutions": ()}}, r"resolutions must be some numbers, such as \(1,\), got \(\)"),
        ({"domain_options": {"floor": 0.0}}, "floor must be above 0, got 0.0"),
    ],
)
def test_recipes_that_are_none(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        domain_of(SMALL.replace(**changes))


# ---- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unraced")
def test_a_vocoder_trains_resumes_reports_and_writes_sounds(tmp_path, capsys):
    run = tmp_path / "run"
    trainer = fastgan.Trainer(SMALL, out=run, device="cpu", quiet=True)
    result = trainer.fit()
    assert result.step == 4 and {"mel", "kcd", "extra_g_loss"} <= result.metrics.keys()
    page = (run / "report.html").read_text()
    assert page.count("<audio controls") >= 2 and "Distance of spectrograms" in page
    out = tmp_path / "sounds"
    assert main(["sample", "--run", str(run), "--n", "3", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["1.wav", "2.wav", "3.wav"]
    capsys.readouterr()
    assert main(["sample", "--run", str(run), "--out", str(out), "--truncation", "0.5"]) == 2
    assert "--truncation must be left out" in capsys.readouterr().err
    assert main(["interpolate", "--run", str(run), "--out", str(tmp_path / "a.gif")]) == 2
    assert "makes sounds from spectrograms" in capsys.readouterr().err
    check_translations(run, tmp_path, capsys)
    fastgan.Trainer(SMALL.replace(steps=2), out=tmp_path / "parts", device="cpu", quiet=True).fit()
    parts = fastgan.Trainer(SMALL, resume=tmp_path / "parts", quiet=True)
    parts.fit()
    for network in ("generator", "discriminator"):
        weights = (getattr(run, network).state_dict().items() for run in (trainer, parts))
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*weights, strict=True))


def frames_of(path):
    with wave.open(str(path)) as sound:
        return sound.getnframes()


def check_translations(run, tmp_path, capsys):
    """Every sound of a folder is made again from its spectrogram, at its own length; nothing of the folder is lost."""
    sounds, out = tmp_path / "heard", tmp_path / "again"
    of = load_sounds("drums", length=1000).pick(torch.arange(3))[:, 0]
    for name, sound in (("a.wav", of[0]), ("deep/b.wav", torch.cat([of[1], of[2, :300]])), ("short.wav", of[2, :5])):
        (sounds / name).parent.mkdir(parents=True, exist_ok=True)
        with open(sounds / name, "wb") as file:
            save_wav(sound, 8000, file)
    (sounds / "torn.wav").write_bytes(b"RIFF")
    words = ["translate", "--run", str(run), "--input", str(sounds)]
    assert main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"3 sounds: {out}\n" and shown.err.startswith("torn.wav: ") and shown.err.count("\n") == 1
    found = {p.relative_to(out).as_posix(): p for p in out.rglob("*.wav")}
    lengths = {"a.wav": 1000, "deep/b.wav": 1300, "short.wav": 5}
    assert {name: frames_of(path) for name, path in found.items()} == lengths
    generator, config = load_generator(run)
    domain = domain_of(fastgan.Recipe.from_dict(config["recipe"]))
    with torch.no_grad():
        whole = generator.eval()(domain.spectrogram(F.pad(of[0], (0, 24))[None, None]))[0, 0, :1000]
    made = load_sounds(str(out / "a.wav"), length=1000).pick(torch.tensor([0]))[0, 0]
    assert (made - whole).abs().max() < 2e-4 and whole.abs().max() > 1e-3
    assert main(["translate", "--run", str(run), "--input", str(sounds / "torn.wav"), "--out", str(out)]) == 1
    (tmp_path / "cut.wav").write_bytes((sounds / "a.wav").read_bytes()[: 44 + 2 * 700])
    capsys.readouterr()
    assert main(["translate", "--run", str(run), "--input", str(tmp_path / "cut.wav"), "--out", str(out)]) == 0
    assert "cut.wav: its data end after 700 of the 1,000 samples that its header has" in capsys.readouterr().err
    assert frames_of(out / "cut.wav") == 700
    for wrong, sentence in (
        (["--out", str(sounds)], "--out must not be the folder of the input"),
        (["--out", str(sounds), "--input", str(sounds / "a.wav")], "--out must not be the folder of the input"),
        (["--out", str(out), "--direction", "ab"], "--direction must be left out"),
        (["--out", str(out), "--made", "grey"], "--made must be left out"),
        (["--out", str(out), "--input", str(tmp_path / "none")], "--input must be a folder of sounds, or one"),
    ):
        capsys.readouterr()
        assert main([*words, *wrong]) == 2
        assert sentence in capsys.readouterr().err
