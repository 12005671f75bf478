"""Sounds: files and what is wrong with them, spectrograms, and the recipe `wavegan` through trainer and command."""

import base64
import io
import wave

import numpy as np
import pytest
import torch

import fastgan
from fastgan.cli import main
from fastgan.data.sounds import drums, load_sounds, save_wav
from fastgan.domains import domain_of
from fastgan.domains.sound import spectrograms
from fastgan.metrics import features, kernel_distance
from fastgan.models.wavegan import PhaseShuffle

SMALL = fastgan.recipes()["wavegan"].replace(
    model_options={"g_width": 2, "d_width": 2},
    domain_options={"length": 256},
    schedule="constant",  # a part of a run has its rates
    **dict(batch_size=4, steps=4, eval_every=2, log_every=1, sample_count=6, d_steps=2),
)


def tone(count, rate=8000, frequency=440.0, loud=0.5):
    return (loud * np.sin(2 * np.pi * frequency * np.arange(count) / rate)).astype(np.float32)


def write(path, sound, rate=8000, width=2, channels=1):
    top = 2 ** (8 * width - 1)
    numbers = np.rint(np.clip(sound, -1, 1) * (top - 1)).astype(np.int64)
    raw = (numbers + 128).astype(np.uint8).tobytes() if width == 1 else numbers.astype("<i8")[:, None].view(np.uint8)
    with wave.open(str(path), "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes(raw if width == 1 else raw[:, :width].tobytes())


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_of_every_width_is_read(tmp_path, width):
    sound = tone(256)
    write(tmp_path / "a.wav", sound, width=width)
    found = load_sounds(str(tmp_path), length=128)
    assert found.rate == 8000 and found.values.shape == (2, 128) and not found.skipped
    heard = found.pick(torch.arange(2)).flatten()
    assert (heard - torch.from_numpy(sound)).abs().max() < (0.012 if width == 1 else 1e-4)


def test_channels_are_averaged(tmp_path):
    both = np.stack([tone(128), np.zeros(128, np.float32)], 1).ravel()
    write(tmp_path / "a.wav", both, channels=2)
    heard = load_sounds(str(tmp_path), length=128).pick(torch.tensor([0])).flatten()
    assert (heard - torch.from_numpy(tone(128)) / 2).abs().max() < 1e-4


def test_what_is_wrong_is_counted_and_named_and_nothing_else_is_lost(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soxr", None)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    write(tmp_path / "clipped.wav", tone(256, loud=3.0))
    write(tmp_path / "fast.wav", tone(256, rate=16000), rate=16000)
    write(tmp_path / "good.wav", np.concatenate([tone(256), np.zeros(128, np.float32), tone(63)]))
    write(tmp_path / "short.wav", tone(40))
    write(tmp_path / "silent.wav", np.zeros(300, np.float32))
    (tmp_path / "broken.wav").write_bytes(b"RIFF\0\0\0\0WAVE")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is no sound at all, whatever its name may say")
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    whole = (tmp_path / "good.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: 44 + 2 * 128 + 1])
    header = bytearray(whole)
    header[20] = 3  # the format of floats
    (tmp_path / "float.wav").write_bytes(header)
    sounds = load_sounds(str(tmp_path), length=128)
    assert sounds.rate == 8000 and len(sounds) == 2 + 3 + 1 + 1  # clipped, good, short, cut
    said = dict(sounds.skipped)
    assert said.keys() == {
        *("clipped.wav", "fast.wav", "good.wav", "short.wav", "silent.wav", "broken.wav", "empty.wav", "text.wav"),
        *("a.flac", "float.wav", "cut.wav"),
    }
    assert said["cut.wav"] == "its data end after 128 of the 447 samples that its header has"
    assert said["clipped.wav"].startswith("it is clipped (") and said["clipped.wav"].endswith("and stays")
    assert (
        said["fast.wav"].endswith("and it is left out; pip install soxr resamples it")
        and "16,000 Hz" in said["fast.wav"]
    )
    assert said["good.wav"] == "1 silent part left out" and said["silent.wav"] == "it is silent"
    assert said["short.wav"] == "it has 40 of 128 samples and is filled up with silence"
    assert "soundfile" in said["a.flac"] and "soundfile" in said["float.wav"] and all(said.values())
    assert len(caplog.records) == 1 and f"11 files of {tmp_path} are not as they should be: a.flac: " in caplog.text
    assert (
        "soundfile (2 such); broken.wav: " in caplog.text and "a run has all of them in its skipped.txt" in caplog.text
    )


def test_the_end_of_a_sound_is_in_the_last_window(tmp_path):
    ramp = np.linspace(0.1, 0.9, 300, dtype=np.float32)
    write(tmp_path / "a.wav", ramp)
    write(tmp_path / "b.wav", np.concatenate([ramp[:256], np.zeros(44, np.float32)]))
    sounds = load_sounds(str(tmp_path), length=128)
    want = torch.from_numpy(np.stack([ramp[:128], ramp[128:256], ramp[172:], ramp[:128], ramp[128:256]]))
    # rounded twice, to 32,768 and to 32,767 steps
    torch.testing.assert_close(sounds.pick(torch.arange(5))[:, 0], want, atol=1.5 / 32767, rtol=0)
    assert len(sounds) == 5 and sounds.skipped == [("b.wav", "1 silent part left out")]


def test_other_rates_are_resampled_where_soxr_is(tmp_path):
    pytest.importorskip("soxr")
    write(tmp_path / "a.wav", tone(800))
    write(tmp_path / "b.wav", tone(1600, rate=16000), rate=16000)
    sounds = load_sounds(str(tmp_path), length=800, rate=8000)
    a, b = sounds.pick(torch.arange(2))[:, 0, 100:700]
    assert (a - b).abs().max() < 0.01 and "it is resampled" in dict(sounds.skipped)["b.wav"]


def test_sounds_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"must hold sounds \(.*\.wav\), it holds none"):
        load_sounds(str(tmp_path), length=128)
    write(tmp_path / "a.wav", np.zeros(10, np.float32))
    with pytest.raises(ValueError, match=r"must hold a sound, it holds none; a\.wav: it is silent"):
        load_sounds(str(tmp_path), length=128)


def test_the_demonstration_is_the_same_each_time_and_varied():
    sounds = drums(2048, 40)
    assert np.array_equal(sounds, drums(2048, 40)) and len({s.tobytes() for s in sounds}) == 40
    assert (np.abs(sounds).max(1) > 16000).all() and np.abs(sounds).max() <= 0.9 * 32767 + 1


def test_what_is_written_is_what_was_read():
    sound, file = torch.from_numpy(tone(100)), io.BytesIO()
    save_wav(torch.cat([sound, torch.tensor([2.0, torch.nan])]), 8000, file)
    with wave.open(io.BytesIO(file.getvalue())) as back:
        assert (back.getframerate(), back.getnframes()) == (8000, 102)
        numbers = np.frombuffer(back.readframes(102), "<i2")
    assert numbers[100] == 32767 and numbers[101] == 0 and np.abs(numbers[:100] / 32767 - tone(100)).max() < 2e-5


# ---- pictures and networks ------------------------------------------------------------------------------------------


def test_a_spectrogram_shows_the_frequency_and_its_level():
    picture = spectrograms(torch.from_numpy(tone(4096, frequency=1000.0, loud=1.0))[None])
    assert picture.shape == (1, 1, 128, 65)
    column = picture[0, 0, :, 32]
    assert int(column.argmax()) == 127 - 32 and column.max() == pytest.approx(1.0, abs=1e-3)  # bin 32 of 8000/256 Hz
    assert spectrograms(torch.zeros(1, 4096)).max() == -1


def test_the_metric_orders_what_is_nearer_and_farther():
    sounds = torch.from_numpy(drums(4096, 240)).float() / 32767
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    look = lambda some: features(spectrograms(some))
    half = look(sounds[order[:120]])
    other, one_kind, silence = (
        kernel_distance(half, look(x)) for x in (sounds[order[120:]], sounds[::4], torch.zeros(60, 4096))
    )
    assert abs(other) < 0.05 < one_kind / 2 and one_kind < silence


def test_phase_shuffle_moves_each_sample_by_itself():
    torch.manual_seed(0)
    x = torch.arange(6.0).expand(64, 2, 6)
    moved = PhaseShuffle(2)(x)
    ways = {tuple(row.tolist()) for row in moved[:, 0]}
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert ways == {(2, 1, 0, 1, 2, 3), (1, 0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 4), (2, 3, 4, 5, 4, 3)}
    assert PhaseShuffle(2).eval()(x) is x and PhaseShuffle(0)(x) is x
    y = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)

    def fixed(y):
        torch.manual_seed(1)
        return PhaseShuffle(2)(y) ** 2

    assert torch.autograd.gradcheck(fixed, y) and torch.autograd.gradgradcheck(fixed, y)


def test_the_generator_convolves_repeated_neighbours():
    generator, _ = fastgan.models.build("wavegan", length=256, latent=3, g_width=2, d_width=2)
    up = [m for m in generator.double().modules() if isinstance(m, torch.nn.ConvTranspose1d)][-1]
    x = torch.randn(5, up.in_channels, 7, dtype=torch.float64)
    weight = up.parametrizations.weight.original
    assert weight.shape == (2, 1, 25)
    plain = torch.nn.Conv1d(up.in_channels, up.out_channels, 25, padding=12, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(weight.flip(2).transpose(0, 1))
        plain.bias.copy_(up.bias.normal_())
    want = plain(torch.nn.Upsample(scale_factor=4)(x))
    torch.testing.assert_close(up(x), want)
    want.sin().sum().backward()
    up(x).sin().sum().backward()
    torch.testing.assert_close(weight.grad, plain.weight.grad.transpose(0, 1).flip(2))


@pytest.mark.parametrize("length", [0, 63, 101, 2**18 + 4, 64.0])
def test_lengths_that_are_none(length):
    with pytest.raises(ValueError, match="length must be 16 to 63 times a power of 4"):
        fastgan.models.build("wavegan", length=length)


# ---- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unraced")
def test_wavegan_trains_resumes_reports_and_writes_sounds(tmp_path, capsys):
    run = tmp_path / "run"
    trainer = fastgan.Trainer(SMALL, out=run, device="cpu", quiet=True)
    result = trainer.fit()
    assert result.step == 4 and "kcd" in result.metrics and "penalty" in result.metrics
    assert trainer.recipe.domain_options == {"length": 256, "rate": 8000}
    page = (run / "report.html").read_text()
    assert page.count("<audio controls") == 4 and (run / "pictures" / "real.wav").exists()  # last, real, both in time
    heard = base64.b64decode(page.split("data:audio/wav;base64,")[1].split('"')[0])
    with wave.open(io.BytesIO(heard)) as sound:
        assert sound.getnframes() == 6 * (256 + 800)
    out = tmp_path / "sounds"
    assert main(["sample", "--run", str(run), "--n", "10", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [f"{k:02}.wav" for k in range(1, 11)]
    assert main(["sample", "--run", str(run), "--n", "4", "--out", str(tmp_path / "four.png")]) == 0
    assert (tmp_path / "four.wav").exists()
    for wrong in ([], ["--out", str(tmp_path / "a.mp3")]):
        assert main(["sample", "--run", str(run), *wrong]) == 2
        assert "must be a folder for .wav files" in capsys.readouterr().err
    fastgan.Trainer(SMALL.replace(steps=2), out=tmp_path / "parts", device="cpu", quiet=True).fit()
    parts = fastgan.Trainer(SMALL, resume=tmp_path / "parts", quiet=True)
    parts.fit()
    for network in ("generator", "discriminator"):
        weights = (getattr(run, network).state_dict().items() for run in (trainer, parts))
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*weights, strict=True))


def test_settings_that_cannot_be_meant_of_sounds(tmp_path):
    with pytest.raises(ValueError, match="flip must be off for sounds"):
        domain_of(SMALL.with_settings(["flip=true"]))
    with pytest.raises(ValueError, match="sounds must be of 256 samples at any Hz, got 64 at 8000"):
        domain_of(SMALL).fit(load_sounds("drums", length=64))
