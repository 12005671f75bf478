"""Tar files as WebDataset writes them are read in place; damage is named and never fatal."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import data
from fastgan.cli import main


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (10, 10, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two archives of five pictures each with the same keys, with classes 0 to 4, texts and masks beside them."""
    for shard in range(2):
        members = {}
        for k in range(5):
            members[f"{k:04d}.cls"] = b"%d\n" % k
            members[f"{k:04d}.PNG" if k else f"{k:04d}.png"] = png(10 * shard + k)
            members[f"{k:04d}.txt"] = b"a caption"
            members[f"{k:04d}.mask.png"] = png(99)
        write(tmp_path / "set" / f"part-{shard:03d}.tar", members)
    return tmp_path / "set"


def pixels(number: int) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(png(number)))).transpose(2, 0, 1).copy())


def test_a_folder_of_shards(shards):
    images = data.load(shards, image_size=10)
    assert torch.equal(images.images, torch.stack([pixels(k) for k in (0, 1, 2, 3, 4, 10, 11, 12, 13, 14)]))
    assert images.labels.tolist() == [0, 1, 2, 3, 4] * 2 and images.classes == list("01234")
    assert images.skipped == [] and images.name == "set"
    found = data.inspect(shards)
    assert found["kind"] == "tar" and found["ignored"] == {".txt": 10, ".mask.png": 10}
    assert found["classes"] == {str(k): 2 for k in range(5)}


def test_a_range_and_a_single_archive(shards):
    both = data.load(f"{shards}/part-{{000..001}}.tar", image_size=10)
    one = data.load(shards / "part-001.tar", image_size=10)
    assert len(both) == 10 and torch.equal(both.images[5:], one.images)
    with pytest.raises(ValueError, match=r"every file of .*part-002.tar does not"):
        data.load(f"{shards}/part-{{000..002}}.tar")
    with pytest.raises(ValueError, match="must be uncompressed"):
        data.load(shards / "part-000.tar.gz")


def test_classes_by_folders_inside(tmp_path):
    path = write(tmp_path / "a.tar", {"cat/1.png": png(1), "./dog/1.png": png(2), ".hidden/3.png": png(3)})
    images = data.load(path, image_size=10)
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [0, 1]
    write(tmp_path / "b.tar", {"1.png": png(1), "2.png": png(2)})
    assert data.load(tmp_path / "b.tar", image_size=10).labels is None


def test_tars_beside_folders_are_an_ordinary_folder(shards):
    (shards / "unpacked").mkdir()
    Image.new("RGB", (9, 9)).save(shards / "unpacked" / "a.png")
    assert len(data.load(shards)) == 1


def test_broken_members_are_named_and_never_fatal(shards, caplog):
    write(
        shards / "part-001.tar",
        {"a.png": b"no picture", "a.cls": b"1", "b.png": png(1), "b.cls": b"many", "c.png": png(2), "c.cls": b"7"},
    )
    images = data.load(shards, image_size=10)
    assert len(images) == 6 and images.labels.tolist() == [0, 1, 2, 3, 4, 7] and len(images.classes) == 8
    assert dict(images.skipped) == {
        "part-001.tar/a.png": "not in an image format that is read",
        "part-001.tar/b.png": "no class number in a .cls, as other images have",
    }
    assert "2 files of set skipped" in caplog.text


@pytest.mark.parametrize("cut", [300, 512 + 100, 3 * 512 + 20, -700])
def test_a_truncated_archive_is_read_up_to_the_damage(shards, cut):
    path = shards / "part-001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:cut] if cut > 0 else content.rstrip(b"\0")[:cut])
    images = data.load(shards, image_size=10)
    assert 5 <= len(images) <= 10 and images.skipped and "part-001.tar" in images.skipped[0][0]
    assert torch.equal(images.images[:5], torch.stack([pixels(k) for k in range(5)]))


def test_a_flipped_header_is_told(shards):
    """tarfile takes it for the end of the archive."""
    path = shards / "part-001.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        content[archive.getmember("0002.PNG").offset + 150] ^= 1  # in its checksum
    path.write_bytes(content)
    images = data.load(shards, image_size=10)
    assert len(images) == 7
    assert [name for name, why in images.skipped if "damaged after byte" in why] == ["part-001.tar"]


def test_every_cut_and_flip_is_survived(tmp_path):
    """A hundred damaged archives: pictures or one sentence, nothing else."""
    path = write(tmp_path / "a.tar", {f"{k}.png": png(k) for k in range(4)})
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for trial in range(100):
        damaged = bytearray(content[: rng.integers(1, len(content))] if trial % 2 else content)
        for at in rng.integers(0, len(damaged), 5):
            damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert len(data.load(path, image_size=10)) <= 4
        except ValueError as error:
            assert str(error).startswith("load: ")


def test_shards_are_cached_and_seen_to_change(shards, tmp_path):
    options = dict(image_size=10, max_bytes=0, cache_dir=tmp_path / "cache")
    first = data.load(shards, **options)
    assert first.mapped and torch.equal(first.images, data.load(shards, image_size=10).images)
    assert data.load(shards, **options).mapped == first.mapped
    write(shards / "part-001.tar", {"0.png": png(1), "0.cls": b"0"})
    again = data.load(shards, **options)
    assert again.mapped != first.mapped and len(again) == 6


def test_training_on_shards(shards, tmp_path, capsys):
    small = ["--set", "image_size=16", "--set", "model_options.g_width=4", "--set", "model_options.d_width=4"]
    words = ["train", "--data", str(shards), "--out", str(tmp_path / "run"), "--batch-size", "4", "--steps", "1"]
    assert main([*words, *small, "--precision", "fp32", "--stream", "--quiet"]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "2", "--quiet"]) == 0
    write(shards / "part-000.tar", {"0.png": png(1), "0.cls": b"0"})
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "3", "--quiet"]) == 2
    assert "6 images and there were 10" in capsys.readouterr().err
