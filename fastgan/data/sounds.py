"""Sounds: from .wav files, and others that soundfile reads; held as 16-bit numbers, in [-1, 1] to the networks."""

from __future__ import annotations

import importlib
import importlib.util
import wave
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastgan.data.files import fingerprint_of, plural
from fastgan.data.folders import files_below
from fastgan.data.memory import require
from fastgan.data.remarks import Remarks, tell
from fastgan.data.sharing import Read, read_once
from fastgan.data.tensorset import Held

__all__ = ["DEMONSTRATION", "SoundSet", "each_sound", "load_sounds", "save_wav"]

DEMONSTRATION = "drums"  # what the recipe trains on where no folder is given
DEMONSTRATION_RATE = 8000  # Hz
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")
FULL = 32767
SILENT = 1e-3  # peak, 60 dB below full scale
CLIPPED = 0.01  # share of numbers at full scale


class SoundSet(Held):
    """Sounds for training.

    Attributes are those of `fastgan.data.Samples`; values: int16 [M, length]; rate: of them, in Hz.
    """

    def __init__(
        self,
        values: Tensor,
        rate: int,
        *,
        name: str = "sounds",
        skipped: Sequence[tuple[str, str]] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(values, name=name, skipped=skipped, device=device)
        self.rate = rate

    def pick(self, indices: Tensor, *, mirror: Tensor | None = None, channels_last: bool = False) -> Tensor:
        """Sounds by number, float32 [N, 1, length] in [-1, 1]; they are never turned around."""
        return self.deliver(self.values.index_select(0, indices))[:, None].float().div_(FULL).clamp_(min=-1)


def load_sounds(source: str, *, length: int, rate: int = 0, device: torch.device | str = "cpu") -> SoundSet:
    """Sounds of a file, of all files below a folder, or of the demonstration set "drums" (see `drums`).

    Args:
        source: the path, or the set's name.
        length: numbers a sound. A file gives one sound after the other; the last one ends where the file ends, so it
            overlaps the one before. A file that is shorter than one is filled up with silence.
        rate: in Hz; 0: the one that most files have. Other files are resampled by soxr; without it they are left out.

    PCM .wav files need no library, all others soundfile. Channels are averaged. What is not as it should be (damaged,
    silent, clipped, short files, data that end early, other rates) is named in `skipped` and logged in one line;
    clipped sounds stay, and of data that end early what is there.

    Raises:
        ValueError: no file, or none that a sound is left of.
    """
    if source == DEMONSTRATION:
        values = torch.from_numpy(drums(length))
        return SoundSet(values, rate or DEMONSTRATION_RATE, name=source, device=device)
    folder, names = files_below(source, SUFFIXES, "sounds")
    packages = [importlib.util.find_spec(name) is not None for name in ("soundfile", "soxr")]
    of = lambda: [fingerprint_of(folder, names), length, rate, packages]
    found = read_once("sounds", of, lambda: _read_all(source, folder, names, length, rate))
    tell(source, found.remarks)
    return SoundSet(found.values, found.facts["rate"], name=source, skipped=found.remarks, device=device)


def _read_all(source: str, folder: Path, names: Sequence[str], length: int, rate: int) -> Read:
    remarks: Remarks = []
    heard = {name: found for name in names if (found := _read(folder / name, name, remarks))}
    rate = rate or max(Counter(r for _, r in heard.values()).items(), key=lambda x: (x[1], x[0]), default=(0, 0))[0]
    parts = [
        windows
        for name, (sound, own) in heard.items()
        if (resampled := _resampled(sound, own, rate, name, remarks)) is not None
        and len(windows := _windows(resampled, length, name, remarks))
    ]
    if not parts:
        raise ValueError(f"load: {source} must hold a sound, it holds none; {_first(remarks)}")
    return Read(torch.from_numpy(np.concatenate(parts)), remarks, {"rate": rate})


def each_sound(source: str, rate: int, remarks: Remarks) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 [samples] in [-1, 1] at `rate`) of a file, or of every file below a folder that can be read.

    What is not as it should be is added to `remarks`, as `load_sounds` says it. Raises ValueError where no file is.
    """
    folder, names = files_below(source, SUFFIXES, "sounds")
    for name in names:
        if found := _read(folder / name, name, remarks):
            sound = _resampled(*found, rate, name, remarks)
            if sound is not None:
                yield name, sound


def _first(remarks: Remarks) -> str:
    return "; ".join(f"{name}: {what}" for name, what in remarks[:3])


# ---- one file -------------------------------------------------------------------------------------------------------


def _read(path: Path, name: str, remarks: Remarks) -> tuple[np.ndarray, int] | None:
    """(float32 [samples] in [-1, 1], rate), or None with a remark."""
    try:
        sound, rate, told = _read_pcm(path) if path.suffix.lower() == ".wav" else _read_other(path)
    except Exception as error:  # damaged files make readers raise nearly anything
        remarks.append((name, " ".join(str(error).split()) or type(error).__name__))
        return None
    if not len(sound) or not np.isfinite(sound).all():
        remarks.append((name, "it has no samples" if not len(sound) else "it has numbers that are not finite"))
        return None
    if len(sound) < told:
        remarks.append((name, f"its data end after {len(sound):,} of the {told:,} samples that its header has"))
    peak = float(np.abs(sound).max())
    if peak < SILENT:
        remarks.append((name, "it is silent"))
        return None
    full = float((np.abs(sound) >= 0.999).mean())
    if full > CLIPPED:
        remarks.append((name, f"it is clipped ({full:.1%} of it at full scale) and stays"))
    return sound, rate


def _read_pcm(path: Path) -> tuple[np.ndarray, int, int]:
    """A .wav of 8, 16, 24 or 32-bit whole numbers by the standard library; any other by soundfile.

    (float32 [samples], rate, samples that the header tells of, which a cut file lacks).
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(told := file.getnframes())
    except wave.Error as error:
        if "unknown format" not in str(error):
            raise
        return _read_other(path)
    except EOFError as error:
        raise ValueError("the file ends before its sound begins") from error
    raw = raw[: len(raw) - len(raw) % (width * channels)]
    if width == 1:
        numbers = np.frombuffer(raw, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:
        bytes_ = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        top = np.zeros((len(bytes_), 4), np.uint8)
        top[:, 1:] = bytes_
        numbers = top.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        numbers = np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    return numbers.reshape(-1, channels).mean(1), rate, told


def _read_other(path: Path) -> tuple[np.ndarray, int, int]:
    soundfile = _extra("soundfile", "this format needs the package soundfile; pip install soundfile")
    sound, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    return sound.mean(1), int(rate), len(sound)


def _extra(package: str, otherwise: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(otherwise) from error


def _resampled(sound: np.ndarray, own: int, rate: int, name: str, remarks: Remarks) -> np.ndarray | None:
    """`sound` at `rate`, or None with a remark."""
    if own == rate:
        return sound
    words = f"its rate is {own:,} Hz, that of the set {rate:,} Hz"
    try:
        soxr = _extra("soxr", f"{words}, and it is left out; pip install soxr resamples it")
    except ValueError as error:
        remarks.append((name, str(error)))
        return None
    remarks.append((name, f"{words}; it is resampled"))
    found: np.ndarray = soxr.resample(sound, own, rate)
    return found


def _windows(sound: np.ndarray, length: int, name: str, remarks: Remarks) -> np.ndarray:
    """int16 [M, length] of the sound, the last one up to its end, without those that add silence alone."""
    if len(sound) < length:
        remarks.append((name, f"it has {len(sound):,} of {length:,} samples and is filled up with silence"))
        sound = np.pad(sound, (0, length - len(sound)))
    begins = range(0, len(sound), length)
    require(6 * len(begins) * length, "cpu", f"load: {len(begins):,} sounds of {name}")
    loud = [at for at in begins if np.abs(sound[at : at + length]).max() >= SILENT]
    if len(loud) < len(begins):
        remarks.append((name, f"{plural(len(begins) - len(loud), 'silent part')} left out"))
    windows = np.zeros((len(loud), length), np.float32)
    for row, at in zip(windows, loud, strict=True):
        at = min(at, len(sound) - length)
        row[:] = sound[at : at + length]
    return np.rint(windows.clip(-1, 1) * FULL).astype(np.int16)


# ---- writing, and the demonstration ---------------------------------------------------------------------------------


def save_wav(sound: Tensor, rate: int, file: BinaryIO) -> None:
    """Write a sound, floats [samples] in [-1, 1], to an open file as 16-bit PCM; what is outside is cut."""
    numbers = sound.detach().float().nan_to_num().clamp(-1, 1).mul(FULL).round().to(torch.int16)
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(numbers.cpu().numpy().astype("<i2").tobytes())


def drums(length: int, count: int = 1200) -> np.ndarray:
    """int16 [count, length] at 8 kHz: bass drums, snares, toms and closed hats in turn, from formulas.

    A drum is a sine whose frequency falls and a burst of noise, each with a decay of its own; pitch, decays and
    loudness differ from one to the next by a fixed random sequence. Nothing recorded is in it.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    time = np.arange(length) / DEMONSTRATION_RATE
    # start and end of the frequency in Hz, its fall, decays of tone and noise in seconds, share of noise
    kinds = np.array(
        [
            (160, 50, 0.03, 0.12, 0.01, 0.05),
            (240, 180, 0.02, 0.06, 0.10, 0.70),
            (200, 110, 0.08, 0.15, 0.02, 0.10),
            (400, 400, 0.01, 0.01, 0.03, 1.00),
        ]
    )
    sounds = np.zeros((count, length), np.int16)
    for row in range(count):
        start, end, fall, tone, noise, share = kinds[row % len(kinds)] * rng.uniform(0.8, 1.25, 6)
        phase = 2 * np.pi * np.cumsum(end + (start - end) * np.exp(-time / fall)) / DEMONSTRATION_RATE
        hiss = rng.standard_normal(length)
        hiss[1:] -= 0.9 * hiss[:-1]  # brighter
        share = min(share, 1.0)
        sound = (1 - share) * np.sin(phase) * np.exp(-time / tone) + 0.3 * share * hiss * np.exp(-time / noise)
        sounds[row] = np.rint(rng.uniform(0.5, 0.9) * FULL * sound / np.abs(sound).max())
    return sounds
