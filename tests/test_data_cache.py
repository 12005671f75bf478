"""Decoded images in a file: made once by one process at a time, gone on with after a kill, checked when it is found."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TINY, assert_same_state, trainer

from fastgan import data
from fastgan._writing import WriteError, growing_file, part_of
from fastgan.data import pixels, store

COUNT, MARK = 30, 8


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Thirty 12 x 12 pictures in two classes, the 6th and the last one broken; a mark after every eighth."""
    for module in (store, pixels):
        monkeypatch.setattr(module, "MARK", MARK)
    rng = np.random.default_rng(1)
    for number in range(COUNT):
        path = tmp_path / "photos" / "ab"[number >= 15] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(path)
        if number in (5, 29):
            path.write_bytes(b"torn")
    return tmp_path / "photos"


def streamed(folder: Path, **options) -> data.ImageSet:
    return data.load(folder, image_size=8, max_bytes=0, cache_dir=folder.parent / "cache", **options)


def stop_at(number: int):
    """A progress function that raises there."""

    def report(done: int, total: int) -> None:
        if done == number:
            raise KeyboardInterrupt

    return report


def counting(monkeypatch) -> list[str]:
    """The names that are decoded from here on."""
    names: list[str] = []
    real = pixels.decode_all
    monkeypatch.setattr(pixels, "decode_all", lambda some, *rest: names.extend(some) or real(some, *rest))
    return names


def test_a_build_that_was_interrupted_goes_on(photos, monkeypatch):
    direct = data.load(photos, image_size=8)
    with pytest.raises(KeyboardInterrupt):
        streamed(photos, progress=stop_at(2 * MARK))
    cache = photos.parent / "cache"
    assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".npy"]
    assert all(p.name.startswith(".") for p in cache.iterdir())
    names, seen = counting(monkeypatch), []
    images = streamed(photos, progress=lambda done, _: seen.append(done))
    assert len(names) == COUNT - 2 * MARK and seen == [3 * MARK, COUNT]
    assert torch.equal(images.images, direct.images) and torch.equal(images.labels, direct.labels)
    assert images.skipped == direct.skipped and len(images.skipped) == 2
    assert not any(p.name.startswith(".") for p in cache.iterdir())


def test_a_killed_build_goes_on(photos, monkeypatch):
    script = f"""
import os, signal
from fastgan.data import load, pixels, store
store.MARK = pixels.MARK = {MARK}
kill = lambda done, total: done == {2 * MARK} and os.kill(os.getpid(), signal.SIGKILL)
load({str(photos)!r}, image_size=8, max_bytes=0, cache_dir={str(photos.parent / "cache")!r}, progress=kill)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    names = counting(monkeypatch)
    assert torch.equal(streamed(photos).images, data.load(photos, image_size=8).images)
    assert names[: COUNT - 2 * MARK] == [f"b/{k:02d}.png" for k in range(2 * MARK, COUNT)]


@pytest.mark.parametrize("what", ["pixels", "journal", "source"])
def test_what_is_left_of_a_build_is_checked(photos, monkeypatch, what):
    """A bit of the second block: the first one stays. A torn journal: what it still says. Another source: nothing."""
    with pytest.raises(KeyboardInterrupt):
        streamed(photos, progress=stop_at(3 * MARK))
    begun = {p.suffix: p for p in (photos.parent / "cache").iterdir()}
    if what == "pixels":
        content = bytearray(begun[".npy"].read_bytes())
        content[store.HEADER + (MARK + 1) * 192] ^= 4
        begun[".npy"].write_bytes(content)
    elif what == "journal":
        text = begun[".json"].read_text().splitlines(keepends=True)
        begun[".json"].write_text("".join(text[:2]) + text[2][:20])
    else:
        Image.new("RGB", (12, 12)).save(photos / "a" / "00.png")
    names = counting(monkeypatch)
    images = streamed(photos)
    assert len(names) == (COUNT if what == "source" else COUNT - MARK)
    assert torch.equal(images.images, data.load(photos, image_size=8).images)


def test_a_damaged_cache_is_made_again(photos, caplog):
    images = streamed(photos)
    want, path = images.images.clone(), images.mapped
    del images
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = streamed(photos)
    assert torch.equal(again.images, want)
    assert "is damaged, it has other pixels among images 23 to 27; it is made again" in caplog.text


def test_a_damaged_prepared_file_is_refused(photos):
    out = photos.parent / "out.npy"
    data.prepare(photos, out, image_size=8)
    assert not [p for p in photos.parent.iterdir() if p.name.startswith(".")]
    array = np.load(out)
    array[3, 0, 0, 0] ^= 1
    np.save(out, array)
    with pytest.raises(ValueError, match=r"as `prepare` wrote it, it has other pixels among images 0 to 6; prep"):
        data.load(out)
    np.save(out, array[:9])
    with pytest.raises(ValueError, match="it has 9 images and there were 28"):
        data.load(out)
    out.with_suffix(".json").unlink()
    assert len(data.load(out)) == 9


def test_a_sample_of_a_large_file_is_checked(photos, monkeypatch):
    """The first and the last block at least."""
    monkeypatch.setattr(store, "CHECKED", 0)
    out = data.prepare(photos, photos.parent / "out.npy", image_size=8)
    content = out.read_bytes()
    for at, seen in ((store.HEADER, True), (len(content) // 2, False), (len(content) - 1, True)):
        damaged = bytearray(content)
        damaged[at] ^= 128
        out.write_bytes(damaged)
        if seen:
            with pytest.raises(ValueError, match="must be as `prepare` wrote it"):
                data.load(out)
        else:
            data.load(out)


def test_a_full_disk_leaves_what_there_is(photos, monkeypatch):
    """A file may be no larger than two blocks here: one sentence, and the next process goes on after them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.HEADER + 3 * MARK * 192 - 500, hard))
    try:
        with pytest.raises(WriteError, match="larger than a file may be here"):
            streamed(photos)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = counting(monkeypatch)
    assert torch.equal(streamed(photos).images, data.load(photos, image_size=8).images)
    assert names[: COUNT - 2 * MARK] == [f"b/{k:02d}.png" for k in range(2 * MARK, COUNT)]


def test_grey_images_of_an_interrupted_build(photos, monkeypatch):
    for path in sorted(photos.rglob("*.png")):
        if path.stat().st_size > 4:
            Image.open(path).convert("L").save(path)
    with pytest.raises(KeyboardInterrupt):
        streamed(photos, progress=stop_at(2 * MARK))
    images = streamed(photos)
    assert images.channels == 1 and torch.equal(images.images, data.load(photos, image_size=8).images)
    assert streamed(photos).channels == 1  # its checksums agree


def test_arrays_go_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.data.arrays.CHUNK", 8)
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), np.uint8))
    with pytest.raises(KeyboardInterrupt):
        data.prepare(tmp_path / "a.npy", tmp_path / "b.npy", image_size=8, progress=stop_at(16))
    seen = []
    data.prepare(tmp_path / "a.npy", tmp_path / "b.npy", image_size=8, progress=lambda done, _: seen.append(done))
    assert seen == [24, 30]
    assert torch.equal(data.load(tmp_path / "b.npy").images, data.load(tmp_path / "a.npy", image_size=8).images)


def test_one_process_decodes_and_the_others_wait(photos, monkeypatch, caplog):
    """As the ranks of a machine do. A lock belongs to an open file, so that threads stand for processes."""
    names, found, began = counting(monkeypatch), [], threading.Event()
    go = threading.Event()

    def hold(done: int, total: int) -> None:
        began.set()
        assert go.wait(20)

    first = threading.Thread(target=lambda: found.append(streamed(photos, progress=hold)))
    first.start()
    assert began.wait(20)
    second = threading.Thread(target=lambda: found.append(streamed(photos)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go.set()
    first.join()
    second.join()
    assert len(names) == COUNT and torch.equal(found[0].images, found[1].images)
    assert caplog.text.count("another process writes") == 1


@pytest.mark.parametrize("why", ["permission", "room"])
def test_ranks_without_a_cache_decode_each_for_itself(photos, monkeypatch, caplog, why):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cache = photos.parent / "cache"
    if why == "permission":
        cache.write_text("a file where the folder should be")
    else:
        monkeypatch.setattr("fastgan.data.cache.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    images = data.load(photos, image_size=8, cache_dir=cache)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    direct = data.load(photos, image_size=8)
    assert torch.equal(images.images, direct.images) and images.skipped == direct.skipped
    assert "each process of this machine decodes all images for itself: " in caplog.text


def test_ranks_of_a_machine_share_its_memory(photos, monkeypatch):
    """A set that one process would hold is in a file for two; one that two hold is decoded once and in memory."""
    monkeypatch.setattr("fastgan.data.loading.free_bytes", lambda _: 3 * COUNT * 192)
    monkeypatch.setenv("FASTGAN_CACHE", str(photos.parent / "cache"))
    assert not data.load(photos, image_size=8, channels=3).streamed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert data.load(photos, image_size=8, channels=3).streamed
    monkeypatch.setattr("fastgan.data.loading.free_bytes", lambda _: 4 * COUNT * 192)
    names = counting(monkeypatch)
    assert not data.load(photos, image_size=8, channels=3).streamed and names == []


def test_a_file_larger_than_memory_is_mapped(tmp_path):
    """numpy's copy-on-write maps reserve their size, and Linux refuses one above main memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    count = 2 * memory // (3 * 64 * 64)
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(store.npy_header((count, 3, 64, 64)))
        file.seek(store.HEADER + (count - 1) * 3 * 64 * 64)
        file.write(bytes([7]) * (3 * 64 * 64))  # all others are a hole
    images = data.load(tmp_path / "a.npy")
    assert len(images) == count and images.mapped and images.images[-1].eq(7).all() and not images.images[5].any()
    images.images[5] += 1  # stays in memory
    assert not data.load(tmp_path / "a.npy").images[5].any()


def test_an_empty_growing_file_leaves_nothing(tmp_path):
    path = tmp_path / "a.npy"
    path.write_text("before")
    with growing_file(path):
        assert part_of(path).exists()
    with pytest.raises(KeyError), growing_file(path):
        raise KeyError
    assert path.read_text() == "before" and not part_of(path).exists()


@pytest.mark.usefixtures("unraced")
def test_a_run_on_a_file_equals_one_in_memory_and_goes_on_bit_for_bit(photos, monkeypatch):
    """Its next batch is read ahead."""
    monkeypatch.setenv("FASTGAN_CACHE", str(photos.parent))
    advised = []
    real = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: advised.append(words[1]) or real(*words))
    recipe = TINY.replace(data=str(photos), steps=4)
    inside, outside = recipe, recipe.replace(domain_options={"stream": True})
    runs = {}
    for name, some in (("memory", inside), ("file", outside), ("half", outside.replace(steps=2))):
        runs[name] = trainer(None, photos.parent / name, some)
        runs[name].fit()
    assert runs["file"].images.streamed and not runs["memory"].images.streamed
    assert_same_state(runs["memory"], runs["file"])
    resumed = trainer(None, None, outside, resume=photos.parent / "half")
    resumed.fit()
    assert_same_state(runs["file"], resumed)
    size = 64  # one channel of 8 x 8
    assert advised and {(at - store.HEADER) % size for at in advised} == {0}
    assert {(at - store.HEADER) // size for at in advised} <= set(range(COUNT))
    Image.new("RGB", (12, 12), (9, 9, 9)).save(photos / "a" / "00.png")
    with pytest.raises(ValueError, match="as many images, but other pixels"):
        trainer(None, None, outside.replace(steps=6), resume=photos.parent / "half")
