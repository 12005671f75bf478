"""Pairs, two sides, sounds, lines and clips on the ranks of one machine: one reads, all map its file."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sharing_ranks import KINDS, LOADERS, counting, parts_of, write_sets

from fastgan.data import sharing


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """A folder for each kind, and a cache of this test's own; torchrun has started two processes here."""
    write_sets(tmp_path)
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return tmp_path


def same(found, direct):
    for a, b in zip(parts_of(found), parts_of(direct), strict=True):
        assert a.values.dtype == b.values.dtype and torch.equal(a.values, b.values)
    assert found.skipped == direct.skipped and direct.skipped
    for fact in ("alphabet", "rate", "source_channels", "name"):
        assert getattr(found, fact, None) == getattr(direct, fact, None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_rank_reads_nothing_and_has_the_same(sets, kind, monkeypatch, caplog):
    files = counting(kind, monkeypatch.setattr)
    first = LOADERS[kind](sets / kind)
    read = len(files)
    second = LOADERS[kind](sets / kind)
    assert read and len(files) == read
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0] == said[1]  # what is wrong with the files is told by each
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    direct = LOADERS[kind](sets / kind)
    assert len(files) == 2 * read  # one process alone keeps nothing
    same(first, direct)
    same(second, direct)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_file_is_read_again(sets, kind):
    before = LOADERS[kind](sets / kind)
    kept = [part.values.clone() for part in parts_of(before)]
    file = next(path for path in sorted((sets / kind).rglob("*.*")) if path.name.startswith("0"))
    content = next(path for path in sorted((sets / kind).rglob("*.*")) if path.name.startswith("1")).read_bytes()
    file.write_bytes(content)
    os.utime(file, ns=(0, 0))
    now = LOADERS[kind](sets / kind)
    assert any(not torch.equal(a.values, b.values) for a, b in zip(parts_of(before), parts_of(now), strict=True))
    # what a run under way has mapped stays as it was
    assert all(torch.equal(a, part.values) for a, part in zip(kept, parts_of(before), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_made_again(sets, kind, caplog):
    before = [part.values.clone() for part in parts_of(LOADERS[kind](sets / kind))]
    path = next((sets / "cache" / "data").glob("*.npy"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # the values that were mapped keep theirs
    path.write_bytes(content)
    again = LOADERS[kind](sets / kind)
    assert "is damaged" in caplog.text
    assert all(torch.equal(a, part.values) for a, part in zip(before, parts_of(again), strict=True))


@pytest.mark.parametrize("why", ["permission", "room"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache_each_rank_reads_for_itself(sets, kind, why, monkeypatch, caplog):
    if why == "permission":
        (sets / "cache").write_text("a file where the folder should be")
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    found = LOADERS[kind](sets / kind)
    assert "each process of this machine" in caplog.text and "for itself: " in caplog.text
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    same(found, LOADERS[kind](sets / kind))
    assert not list((sets / "cache").glob("data/*.npy"))


def test_a_set_without_a_sample_is_refused_by_every_rank(sets):
    (sets / "empty").mkdir()
    (sets / "empty" / "0.txt").write_text("\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="must hold a line of text"):
            LOADERS["lines"](sets / "empty")
    assert not [path for path in (sets / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_values_of_any_shape_come_back_and_are_shared(sets, dtype):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 99, (3000, 2, 3, 7))).to(dtype)
    read = lambda: sharing.Read(values, [("a\udcff", "torn")], {"x": "\n\u00e4"})
    first = sharing.read_once("numbers", lambda: [str(dtype)], read)
    second = sharing.read_once("numbers", lambda: [str(dtype)], lambda: pytest.fail("read again"))
    for found in (first, second):
        assert found.values.dtype == dtype and torch.equal(found.values, values)
        assert (found.remarks, found.facts) == ([("a\udcff", "torn")], {"x": "\n\u00e4"})
        found.values[0] = 5  # a rank's own: the file stays as it is
    assert torch.equal(sharing.read_once("numbers", lambda: [str(dtype)], read).values, values)


def test_a_second_process_waits_for_the_first(sets, caplog):
    """A lock belongs to an open file, so that threads stand for processes."""
    began, go, found = threading.Event(), threading.Event(), []

    def slow() -> sharing.Read:
        began.set()
        assert go.wait(20)
        return sharing.Read(torch.arange(6).view(3, 2), [], {})

    first = threading.Thread(target=lambda: found.append(sharing.read_once("numbers", lambda: 0, slow)))
    first.start()
    assert began.wait(20)
    second = threading.Thread(target=lambda: found.append(sharing.read_once("numbers", lambda: 0, slow)))
    began.clear()
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go.set()
    first.join()
    second.join()
    assert not began.is_set() and all(torch.equal(f.values, torch.arange(6).view(3, 2)) for f in found)
    assert caplog.text.count("another process reads numbers for this one") == 1


def test_what_a_killed_process_left_is_begun_anew(sets):
    folder = sets / "cache" / "data"
    values = torch.arange(40, dtype=torch.int16).view(10, 4)
    read = lambda: sharing.Read(values, [], {})
    sharing.read_once("numbers", lambda: 1, read)
    path = next(folder.glob("numbers-*.npy"))
    path.rename(path.with_name(f".{path.stem}.part.npy"))
    with path.with_name(f".{path.stem}.part.npy").open("ab") as file:
        file.write(b"more than there will be")
    assert torch.equal(sharing.read_once("numbers", lambda: 1, read).values, values)
    assert torch.equal(sharing.read_once("numbers", lambda: 1, lambda: pytest.fail("read again")).values, values)
