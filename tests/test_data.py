"""fastgan.data: every file format, damage, labels, batches and their resumption, grids."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import data
from fastgan.data import arrays, decode
from fastgan.data import pixels as pixels_of
from fastgan.data.catalogue import BUNDLED
from fastgan.data.memory import free_bytes
from fastgan.data.store import npy_header

RED = (200, 30, 10)


def rng_pixels(*shape):
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def smooth(height, width):
    """A colour gradient: what resizing and JPEG keep nearly as it is."""
    y, x = np.mgrid[0:height, 0:width]
    ramp = [255 * x / max(1, width - 1), 255 * y / max(1, height - 1), 127 + 0 * x]
    return np.stack(ramp, -1).astype(np.uint8)


def save(folder, name, image, **options):
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def only(folder, **options):
    """The one image of a folder, as uint8 [C, H, W]."""
    images = data.load(folder, **options)
    assert len(images) == 1 and images.skipped == []
    return images.images[0]


def picture(path):
    """uint8 [H, W, C] or [H, W] of a file, as Pillow alone reads it."""
    with Image.open(path) as image:
        return np.asarray(image)


def sha(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


# ----------------------------------------------------------------------------------------------- bundled


def test_available_names_every_bundled_set():
    assert set(data.available()) == {"emoji-64", "fashion-mnist"}
    for name, text in data.available().items():
        assert f"{len(data.load(name)):,}" in text


def test_fashion_mnist():
    images = data.load("fashion-mnist")
    assert images.images.shape == (10_000, 1, 28, 28) and images.images.dtype == torch.uint8
    assert sha(images.images) == "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a"
    assert sha(images.labels.to(torch.uint8)) == "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"
    assert torch.bincount(images.labels).tolist() == [1000] * 10
    assert images.classes[0] == "T-shirt/top" and images.classes[9] == "Ankle boot" and images.name == "fashion-mnist"


def test_emoji():
    images = data.load("emoji-64")
    assert images.images.shape == (1891, 3, 64, 64)
    assert sha(images.images) == "2027fa240fd72a65489d743b39e1cfbff87eb7ec2a0ea551e6d2bba4ad2aa9ce"
    assert len(images.classes) == 9 and images.classes == sorted(images.classes)
    assert dict(zip(images.classes, torch.bincount(images.labels).tolist(), strict=True))["Flags"] == 261
    assert (images.images.flatten(1).amax(1) == 255).all(), "every emoji has white around it"


def test_bundled_folder_carries_its_licences():
    names = {path.name for path in BUNDLED.iterdir()}
    assert {
        "NOTICE.md",
        "fashion-mnist.copyright",
        "emoji-64.LICENSE-Apache-2.0",
        "emoji-64.LICENSE-MIT",
    } <= names
    notice = (BUNDLED / "NOTICE.md").read_text()
    for name in names - {"NOTICE.md"}:
        assert name in notice
    for line in notice.splitlines():
        if line.strip().endswith(".gz"):
            digest, name = line.split()
            assert hashlib.sha256((BUNDLED / name).read_bytes()).hexdigest() == digest


def test_bundled_resized_and_recoloured():
    images = data.load("fashion-mnist", image_size=32, channels=3, limit=50)
    assert images.images.shape == (50, 3, 32, 32)
    assert torch.equal(images.images[:, 0], images.images[:, 2])
    grey = data.load("emoji-64", channels=1, limit=4).images
    assert grey.shape == (4, 1, 64, 64)


def test_limit_is_spread_over_the_classes():
    pixels = rng_pixels(100, 8, 8)
    images = data.load(pixels, limit=30).images
    assert np.array_equal(images[:, 0].numpy(), pixels[[i * 100 // 30 for i in range(30)]])
    assert len(data.load(pixels, limit=5000)) == 100
    assert torch.bincount(data.load("emoji-64", limit=90).labels, minlength=9).min() >= 3


def test_bundled_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("emoji-64", "a.png", Image.new("RGB", (8, 8), RED))
    assert len(data.load("emoji-64")) == 1891
    assert len(data.load("./emoji-64")) == 1


def test_emoji_sheet_can_be_made_again(tmp_path):
    """The rule of NOTICE.md on a package of five pictures: no components, no duplicates, white behind."""
    package, folder = tmp_path / "package", tmp_path / "package" / "img" / "google" / "64"
    red, clear = Image.new("RGBA", (64, 64), (*RED, 255)), Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    for name, image in (("b.png", red), ("c.png", red), ("a.png", clear)):
        save(folder, name, image)
    save(folder, "d-tone.png", Image.new("RGBA", (64, 64), (9, 9, 9, 255)))
    save(folder, "e.png", Image.new("RGBA", (64, 64), (1, 1, 1, 255)))
    entries = [("a.png", "Smileys & Emotion"), ("b.png", "Flags"), ("c.png", "Flags"), ("e.png", "Component")]
    (package / "emoji.json").write_text(json.dumps([{"image": n, "category": c} for n, c in entries]))
    from fastgan.data.catalogue import make_emoji_sheet

    make_emoji_sheet(package, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "emoji-64.json").read_text())["names"] == [
        "Flags/b.png",
        "Smileys_Emotion/a.png",
    ]
    sheet = picture(tmp_path / "out" / "emoji-64.webp")
    assert sheet.shape == (64, 44 * 64, 3)
    assert (sheet[:, :64] == RED).all() and (sheet[:, 64:128] == 255).all()


# --------------------------------------------------------------------------------------- formats and modes


@pytest.mark.parametrize(
    ("name", "mode", "options", "tolerance"),
    [
        ("a.png", "RGB", {}, 0),
        ("a.apng", "RGB", {"format": "PNG"}, 0),
        ("a.bmp", "RGB", {}, 0),
        ("a.tiff", "RGB", {"compression": "tiff_lzw"}, 0),
        ("a.ppm", "RGB", {}, 0),
        ("a.tga", "RGB", {}, 0),
        ("a.webp", "RGB", {"lossless": True}, 0),
        ("a.JPG", "RGB", {"quality": 95}, 6),
        ("a.jpeg", "CMYK", {"quality": 95}, 6),
        ("a.tif", "CMYK", {}, 1),
        ("a.tif", "YCbCr", {}, 3),
        ("a.gif", "P", {}, 60),
    ],
)
def test_colour_formats(tmp_path, name, mode, options, tolerance):
    pixels = smooth(64, 64)
    save(tmp_path, name, Image.fromarray(pixels).convert(mode), **options)
    got = only(tmp_path)
    assert got.shape == (3, 64, 64)
    assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - pixels).max() <= tolerance


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_transparency_becomes_white(tmp_path, name):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., :3] = RED
    pixels[:32, :, 3] = 0
    pixels[32:48, :, 3] = 255
    pixels[48:, :, 3] = 128
    save(
        tmp_path,
        name,
        Image.fromarray(pixels),
        **({"lossless": True, "exact": True} if name == "a.webp" else {}),
    )
    got = only(tmp_path).permute(1, 2, 0).numpy().astype(int)
    assert (got[:32] == 255).all() and (got[32:48] == RED).all()
    half = [round(255 + (value - 255) * 128 / 255) for value in RED]
    assert np.abs(got[48:] - half).max() <= 1


def test_grey_with_alpha(tmp_path):
    image = Image.merge("LA", (Image.new("L", (64, 64), 90), Image.linear_gradient("L").resize((64, 64))))
    save(tmp_path, "a.png", image)
    got = only(tmp_path)
    assert got.shape == (1, 64, 64) and got[0, 0, 0] >= 253 and abs(int(got[0, -1, 0]) - 90) <= 2


def test_palette_with_transparent_index(tmp_path):
    image = Image.new("P", (64, 64), 0)
    image.putpalette([*RED, 0, 0, 255])
    image.paste(1, (0, 32, 64, 64))
    save(tmp_path, "a.png", image, transparency=1)
    save(tmp_path, "b.gif", image, transparency=1)
    for got in data.load(tmp_path).images:
        assert (got[:, :32].permute(1, 2, 0) == torch.tensor(RED)).all() and (got[:, 32:] == 255).all()


def test_palette_with_alpha_per_index(tmp_path):
    image = Image.new("P", (64, 64), 0)
    image.putpalette([*RED, 0, 0, 255])
    save(tmp_path, "a.png", image, transparency=bytes([0, 255]))
    assert (only(tmp_path) == 255).all()


def test_rgb_with_transparent_colour(tmp_path):
    save(tmp_path, "a.png", Image.new("RGB", (64, 64), RED), transparency=RED)
    assert (only(tmp_path) == 255).all()


def test_one_bit(tmp_path):
    bits = rng_pixels(64, 64) > 127
    save(tmp_path, "a.png", Image.fromarray(bits))
    save(tmp_path, "b.pbm", Image.fromarray(bits))
    for got in data.load(tmp_path).images:
        assert torch.equal(got[0], torch.from_numpy(bits * np.uint8(255)))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bit_grey(tmp_path, name):
    values = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64) * 16
    save(tmp_path, name, Image.fromarray(values.astype(np.uint16)))
    got = only(tmp_path)
    assert got.shape == (1, 64, 64)
    assert np.array_equal(got[0].numpy(), np.rint(values / 257).astype(np.uint8))


def test_float_tiff(tmp_path):
    values = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    save(tmp_path, "a.tif", Image.fromarray(values))
    assert np.array_equal(only(tmp_path)[0].numpy(), np.rint(values * 255).astype(np.uint8))


def test_integers_and_floats_without_a_defined_white_are_skipped(tmp_path):
    save(tmp_path, "a.png", Image.new("L", (8, 8)))
    save(tmp_path, "deep.tif", Image.fromarray(np.full((8, 8), 70_000, np.int32)))
    save(tmp_path, "float.tif", Image.fromarray(np.full((8, 8), 200.0, np.float32)))
    skipped = dict(data.load(tmp_path).skipped)
    assert "0..65535" in skipped["deep.tif"] and "0..1" in skipped["float.tif"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_rotation(tmp_path, orientation, name):
    """The stored picture is turned such that applying its EXIF orientation gives the upright one."""
    upright = Image.fromarray(smooth(64, 96))
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path, name, stored, exif=exif, quality=95)
    got = only(tmp_path).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - smooth(64, 96)[:, 16:80]).max() <= 12


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        options = {"lossless": True} if name == "a.webp" else {}
        save(tmp_path, name, frames[0], save_all=True, append_images=frames[1:], **options)
    images = data.load(tmp_path)
    assert len(images) == 4
    assert (images.images.permute(0, 2, 3, 1) == torch.tensor(RED)).all()


# ---------------------------------------------------------------------------------------- size and channels


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (65, 64), (64, 67)])
def test_centre_crop_keeps_pixels(tmp_path, height, width):
    pixels = rng_pixels(height, width, 3)
    save(tmp_path, "a.png", Image.fromarray(pixels))
    top, left = (height - 64) // 2, (width - 64) // 2
    expected = pixels[top : top + 64, left : left + 64]
    assert np.array_equal(only(tmp_path).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_shrinking_is_antialiased(tmp_path, name):
    """Stripes of one pixel average to grey; nearest or plain bilinear sampling would keep or alias them."""
    pixels = np.zeros((1024, 1024), np.uint8)
    pixels[:, ::2] = 255
    save(tmp_path, name, Image.fromarray(pixels), **({"quality": 95} if name == "a.jpg" else {}))
    got = only(tmp_path, image_size=32).float()
    assert got[..., 2:-2].sub(127.5).abs().max() < 4


def test_jpeg_at_a_fraction_of_its_size_equals_full_decoding(tmp_path):
    detail = Image.fromarray(rng_pixels(96, 64, 3)).resize((1024, 1536), Image.Resampling.BICUBIC)
    save(tmp_path, "a.jpg", detail, quality=95)
    full = Image.fromarray(picture(tmp_path / "a.jpg")).crop((0, 256, 1024, 1280))
    full = np.asarray(full.resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(only(tmp_path).permute(1, 2, 0).numpy() - full).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2)])
def test_tiny_images_are_enlarged(tmp_path, size):
    save(tmp_path, "a.png", Image.new("RGB", size, RED))
    assert (only(tmp_path, image_size=16).permute(1, 2, 0) == torch.tensor(RED)).all()


def test_mixed_sizes_and_default_size(tmp_path):
    for number, size in enumerate([(10, 10), (100, 60), (64, 64), (33, 200)]):
        save(tmp_path, f"{number}.png", Image.new("RGB", size, RED))
    assert data.load(tmp_path).images.shape == (4, 3, 64, 64)
    assert data.load(tmp_path, image_size=48).image_size == (48, 48)


def test_channels_are_one_only_if_every_image_is_grey(tmp_path):
    grey = rng_pixels(64, 64)
    save(tmp_path, "a.png", Image.fromarray(grey))
    save(tmp_path, "b.png", Image.fromarray(grey).convert("RGB"))
    images = data.load(tmp_path)
    assert images.channels == 1 and np.array_equal(images.images[1, 0].numpy(), grey)
    assert data.load(tmp_path, channels=3).images.shape == (2, 3, 64, 64)
    save(tmp_path, "c.png", Image.new("RGB", (64, 64), RED))
    images = data.load(tmp_path)
    assert images.channels == 3 and np.array_equal(images.images[0].numpy(), np.stack([grey] * 3))
    luminance = data.load(tmp_path, channels=1).images[2]
    assert abs(int(luminance[0, 0, 0]) - (0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])) <= 1


# ------------------------------------------------------------------------------------------ folders and zips


def tree(folder, names, colour=RED):
    for name in names:
        save(folder, name, Image.new("RGB", (16, 16), colour))


def packed(folder, archive):
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                target.write(path, path.relative_to(folder).as_posix())
    return archive


@pytest.fixture(params=["folder", "zip"])
def source(request, tmp_path):
    """A folder to fill, and a function that gives it as a folder or as a zip of it."""
    folder = tmp_path / "set"
    folder.mkdir()
    return folder, (lambda: folder) if request.param == "folder" else (lambda: packed(folder, tmp_path / "set.zip"))


def test_labels_by_folder(source):
    folder, given = source
    tree(folder, ["dog/2.png", "dog/deep/1.png", "cat/1.png", "Ant/9.png", "cat/0.png"])
    images = data.load(given())
    assert images.classes == ["Ant", "cat", "dog"]
    assert images.labels.tolist() == [0, 1, 1, 2, 2] and images.labels.dtype == torch.int64


def test_one_folder_is_one_class(source):
    folder, given = source
    tree(folder, ["all/1.png", "all/2.png"])
    images = data.load(given())
    assert images.classes == ["all"] and images.labels.tolist() == [0, 0]


def test_wrapping_folder_is_looked_through(source):
    folder, given = source
    tree(folder, ["set/train/a/1.png", "set/train/b/1.png", "set/train/b/2.png"])
    images = data.load(given())
    assert images.classes == ["a", "b"] and images.labels.tolist() == [0, 1, 1]


def test_no_labels_if_one_image_lies_outside(source):
    folder, given = source
    tree(folder, ["a/1.png", "b/1.png", "1.png"])
    images = data.load(given())
    assert len(images) == 3 and images.labels is None and images.classes is None


def test_hidden_files_and_macosx_do_not_count(source):
    folder, given = source
    tree(folder, ["a.png", ".hidden.png", ".cache/b.png", "__MACOSX/c.png", "x/__MACOSX/._d.png", "._a.png"])
    (folder / ".DS_Store").write_bytes(b"x")
    images = data.load(given())
    assert len(images) == 1 and images.skipped == []


def test_order_is_by_path_and_the_same_for_folder_and_zip(tmp_path):
    folder = tmp_path / "set"
    for number in range(40):
        # Late names are decoded fastest, so a pool that returned them as they finish would reorder them.
        size = 900 if number < 4 else 16
        save(folder, f"{number:02d}.png", Image.fromarray(np.full((size, size), number, np.uint8)))
    for given in (folder, packed(folder, tmp_path / "set.zip")):
        assert data.load(given, image_size=16).images[:, 0, 0, 0].tolist() == list(range(40))


def test_zip_with_backslashes_and_without_folders(tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (8, 8), RED).save(png, "PNG")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        for name in ("a\\1.png", "b\\1.png"):
            # Python on Linux keeps the backslash, as a Windows tool may have written it.
            archive.writestr(name, png.getvalue())
    assert data.load(tmp_path / "w.zip").classes == ["a", "b"]


def test_nothing_of_a_zip_is_written_to_disk(tmp_path, monkeypatch):
    png = io.BytesIO()
    Image.new("RGB", (8, 8), RED).save(png, "PNG")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../evil.png", png.getvalue())
        archive.writestr("/abs/evil.png", png.getvalue())
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    # A part ".." counts as hidden; the absolute name is only a name.
    assert len(data.load(tmp_path / "evil.zip")) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil.zip", "in"]


def test_links_are_followed_once(tmp_path):
    tree(tmp_path / "real", ["1.png"])
    root = tmp_path / "set"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "real")
    (root / "b").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(root)
    images = data.load(root)
    assert images.classes == ["a", "b"] and len(images) == 2


# ------------------------------------------------------------------------------------------------- damage


def damaged(folder):
    """Two good images among everything that can be wrong with a file; returns {name: part of the reason}."""
    tree(folder, ["good.png"])
    noise = Image.fromarray(rng_pixels(64, 64, 3))
    save(folder, "fine.jpg", noise)
    for name in ("cut.png", "cut.jpg", "cut.gif", "cut.webp", "cut.bmp"):
        path = save(folder, name, noise)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    flipped = bytearray((folder / "good.png").read_bytes())
    flipped[-20] ^= 255
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "photo.heic").write_bytes(b"\0" * 40)
    return {
        **dict.fromkeys(("cut.png", "cut.jpg", "cut.bmp"), "truncated"),
        **dict.fromkeys(("cut.gif", "cut.webp", "flipped.png"), ""),
        **dict.fromkeys(("text.jpg", "script.png"), "not in an image format"),
        "empty.png": "empty file",
        "photo.heic": "HEIC is not read",
    }


def test_damaged_files_are_named_never_fatal(source, caplog):
    folder, given = source
    expected = damaged(folder)
    images = data.load(given())
    assert len(images) == 2
    assert [name for name, _ in images.skipped] == sorted(expected)
    for name, reason in images.skipped:
        assert reason and expected[name] in reason and "0x" not in reason
    assert len(caplog.records) == 1 and "10 files of set" in caplog.text and "cut.bmp" in caplog.text


def test_a_file_damaged_inside_a_zip_is_skipped(tmp_path):
    tree(tmp_path / "set", ["a.png", "b.png"])
    archive = packed(tmp_path / "set", tmp_path / "set.zip")
    with zipfile.ZipFile(archive) as opened:
        entry = opened.getinfo("a.png")
    content = bytearray(archive.read_bytes())
    content[entry.header_offset + 50] ^= 255
    archive.write_bytes(content)
    images = data.load(archive)
    assert len(images) == 1 and [name for name, _ in images.skipped] == ["a.png"]


def test_decompression_bombs_are_skipped(tmp_path, monkeypatch):
    tree(tmp_path, ["a.png"])
    save(tmp_path, "big.png", Image.new("1", (150, 150)))
    save(tmp_path, "huge.png", Image.new("1", (300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    images = data.load(tmp_path)
    assert len(images) == 1
    assert [name for name, _ in images.skipped] == ["big.png", "huge.png"]
    assert all("decompression bombs (20,000)" in reason for _, reason in images.skipped)


def test_files_too_large_to_open_are_skipped(source, monkeypatch):
    folder, given = source
    tree(folder, ["a.png"])
    save(folder, "b.bmp", Image.fromarray(rng_pixels(64, 64, 3)))
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 2000)
    images = data.load(given())
    assert len(images) == 1 and "more than the" in dict(images.skipped)["b.bmp"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_dead_links_do_not_hang(tmp_path):
    tree(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere.png")
    skipped = dict(data.load(tmp_path).skipped)
    assert "not a regular file" in skipped["pipe.png"] and "no such file" in skipped["dead.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_forbidden_files_are_skipped(tmp_path):
    tree(tmp_path, ["a.png", "b.png"])
    (tmp_path / "b.png").chmod(0)
    assert data.load(tmp_path).skipped == [("b.png", "permission denied")]


def test_names_that_are_no_text(tmp_path):
    tree(tmp_path, ["a.png"])
    try:
        with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
            pass
    except OSError:
        pytest.skip("this file system allows only text as names")
    assert data.load(tmp_path).skipped == [("\\udcff.png", "empty file")]


def test_warnings_of_pillow_stay_inside(tmp_path):
    """pytest turns warnings into errors; the filters are as before afterwards."""
    import warnings

    before = list(warnings.filters)
    image = Image.new("RGB", (16, 16), RED)
    path = save(tmp_path, "a.tif", image)
    # A broken EXIF block: Pillow warns, the pixels are fine.
    save(tmp_path, "b.jpg", image, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x40\x01\x12\0\x03")
    assert path.is_file() and len(data.load(tmp_path)) == 2
    assert warnings.filters == before


# ---------------------------------------------------------------------------------------------- sentences


def test_empty_sources_say_what_was_found(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"at least one readable image, .*empty has no files; suffixes read: .*\.png"):
        data.load(tmp_path / "empty")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.txt", "b.txt", "c.mp4", "noname"):
        (other / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has 4 other files \(2 \.txt, 1 \.mp4, 1 no suffix\)"):
        data.load(other)
    (other / "bad.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"and 1 unreadable image \(bad.png: not in an image format that is read\)"):
        data.load(other)
    with zipfile.ZipFile(tmp_path / "e.zip", "w"):
        pass
    with pytest.raises(ValueError, match="a zip must hold at least one readable image"):
        data.load(tmp_path / "e.zip")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (None, None, "does not exist"),
        ("a.zip", b"no archive", "must be a readable archive"),
        ("a.npy", b"no array", "must hold an array of numbers"),
        ("a.npz", b"no archive", "must hold arrays of numbers|must be a readable archive"),
        ("a-ubyte", b"hello world", "must start with 00 00 TYPE DIMS"),
        (
            "a-ubyte.gz",
            gzip.compress(b"\0\0\x08\x03\0\0\0\x09\0\0\0\x02\0\0\0\x02abcd", mtime=0),
            "holds 4 of 36 bytes",
        ),
        ("a-ubyte.gz", gzip.compress(b"\0\0\x08\x03" + b"\1" * 99, mtime=0)[:-20], "must be complete"),
        ("a-ubyte", b"\0\0\x08\x01\0\0\0\x02ab", "must have 3 or 4 dimensions"),
        ("a.parquet", b"PAR1", "none of them by its name"),
        ("a.png", b"", "must hold many images"),
    ],
)
def test_wrong_sources(tmp_path, name, content, sentence):
    path = tmp_path / (name or "nothing")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        data.load(path)


def test_a_misspelt_name_is_corrected():
    with pytest.raises(ValueError, match="did you mean emoji-64"):
        data.load("emoji64")
    with pytest.raises(TypeError, match="got list"):
        data.load([1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_size": 0},
        {"image_size": 6.5},
        {"image_size": True},
        {"channels": 2},
        {"limit": 0},
        {"max_bytes": -1},
    ],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=f"load: {next(iter(arguments))} must be"):
        data.load("fashion-mnist", **arguments)


# -------------------------------------------------------------------------------------------------- arrays


def idx_bytes(array, code=0x08):
    return bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_with_its_labels(tmp_path, suffix):
    pixels, labels = rng_pixels(12, 9, 9), np.arange(12, dtype=np.uint8) % 3
    write = gzip.compress if suffix else bytes
    (tmp_path / f"my-images-idx3-ubyte{suffix}").write_bytes(write(idx_bytes(pixels)))
    images = data.load(tmp_path / f"my-images-idx3-ubyte{suffix}")
    assert images.labels is None and np.array_equal(images.images[:, 0].numpy(), pixels)
    (tmp_path / "my-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    images = data.load(tmp_path / f"my-images-idx3-ubyte{suffix}", limit=6)
    assert images.labels.tolist() == [0, 2, 1, 0, 2, 1] and images.classes == ["0", "1", "2"]
    (tmp_path / "my-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels[:5])))
    with pytest.raises(ValueError, match="labels must be 12 integers"):
        data.load(tmp_path / f"my-images-idx3-ubyte{suffix}")


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 1, 8, 8), (6, 3, 8, 8), (6, 8, 8, 3), (6, 8, 8, 1), (5, 9, 7, 3)])
@pytest.mark.parametrize("kind", ["npy", "npz", "tensor", "array"])
def test_layouts(tmp_path, shape, kind):
    pixels = rng_pixels(*shape)
    expected = pixels
    if len(shape) == 3:
        expected = pixels[:, None]
    elif shape[1] not in (1, 3):
        expected = pixels.transpose(0, 3, 1, 2)
    given = {"tensor": torch.from_numpy(pixels), "array": pixels}.get(kind, tmp_path / f"a.{kind}")
    if kind == "npy":
        np.save(given, pixels)
    elif kind == "npz":
        np.savez(given, images=pixels, labels=np.arange(len(pixels)))
    images = data.load(given)
    assert np.array_equal(images.images.numpy(), expected)
    assert (images.labels is not None) == (kind == "npz")


def test_read_only_and_reversed_arrays():
    pixels = rng_pixels(4, 3, 8, 8)
    pixels.setflags(write=False)
    images = data.load(pixels)
    images.images.zero_()
    assert pixels.any()
    assert np.array_equal(data.load(pixels[::-1, :, :, ::-1]).images.numpy(), pixels[::-1, :, :, ::-1])


def test_ranges_of_numbers():
    pixels = rng_pixels(4, 3, 8, 8)
    exact = torch.from_numpy(pixels)
    as_float = exact.double() / 255
    for given in (as_float, as_float.float(), exact.float() / 127.5 - 1, exact.int(), exact.long()):
        assert torch.equal(data.load(given).images, exact)
    assert torch.equal(data.load(pixels.astype(np.uint16) * 257).images, exact)
    assert torch.equal(data.load(exact > 99).images, (exact > 99).to(torch.uint8) * 255)
    half = data.load(as_float.to(torch.bfloat16)).images
    assert (half.int() - exact.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (torch.full((2, 3, 8, 8), 200.0), "must lie in 0..1 or -1..1"),
        (torch.full((2, 3, 8, 8), -3), "must lie in 0..255"),
        (torch.full((2, 3, 8, 8), float("nan")), "must be finite"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), "integers or floats"),
        (torch.zeros(8, 8), "must be \\[M, H, W\\]"),
        (torch.zeros(64, 48, 3), "add a first dimension"),
        (torch.zeros(0, 3, 8, 8), "no dimension 0"),
        (torch.zeros(2, 5, 8, 8), "1, 3 or 4 channels"),
    ],
)
def test_arrays_without_a_meaning(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.load(given)


def test_arrays_are_resized_like_files(tmp_path):
    pixels = rng_pixels(3, 50, 70, 4)
    for number, picture in enumerate(pixels):
        save(tmp_path, f"{number}.png", Image.fromarray(picture))
    assert torch.equal(data.load(pixels, image_size=24).images, data.load(tmp_path, image_size=24).images)
    assert data.load(pixels).images.shape == (3, 3, 50, 70)


def test_chunks_join_without_seams(monkeypatch):
    pixels = torch.rand(23, 3, 4, 4)
    whole = data.load(pixels).images
    monkeypatch.setattr(arrays, "CHUNK", 5)
    assert torch.equal(data.load(pixels).images, whole)


def test_npz_must_name_its_images(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, first=rng_pixels(2, 8, 8), second=rng_pixels(2, 8, 8))
    with pytest.raises(ValueError, match=r"holds first \[2, 8, 8\], second \[2, 8, 8\]"):
        data.load(path)
    np.savez(path, whatever=rng_pixels(2, 8, 8))
    assert len(data.load(path)) == 2


def test_no_pickles_are_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="array of numbers"):
        data.load(tmp_path / "a.npy")


# ------------------------------------------------------------------------------------- larger than memory


@pytest.fixture
def labelled(tmp_path):
    folder = tmp_path / "photos"
    for number in range(30):
        save(folder, f"{'ab'[number % 2]}/{number:02d}.png", Image.fromarray(rng_pixels(20, 20, 3) ^ number))
    (folder / "a" / "bad.png").write_bytes(b"")
    return folder


def test_large_sets_are_mapped_and_give_the_same_batches(labelled, tmp_path):
    direct = data.load(labelled, image_size=16)
    mapped = data.load(labelled, image_size=16, max_bytes=1000, cache_dir=tmp_path / "cache")
    assert mapped.streamed and mapped.mapped and not direct.streamed
    assert torch.equal(mapped.images, direct.images) and torch.equal(mapped.labels, direct.labels)
    assert mapped.classes == direct.classes and mapped.skipped == direct.skipped and mapped.name == direct.name
    one, two = (s.batches(7, generator=torch.Generator().manual_seed(3), flip=True) for s in (direct, mapped))
    for _ in range(9):
        (x, y), (u, v) = next(one), next(two)
        assert torch.equal(x, u) and torch.equal(y, v)
    assert mapped.to("cpu").mapped == mapped.mapped


def test_cache_is_reused_until_a_file_changes(labelled, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    options = {"image_size": 16, "max_bytes": 1000, "cache_dir": cache}
    first = data.load(labelled, **options)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]
    monkeypatch.setattr(pixels_of, "decode_all", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(data.load(labelled, **options).images, first.images)
    monkeypatch.undo()
    save(labelled, "b/01.png", Image.new("RGB", (20, 20), RED))
    again = data.load(labelled, **options)
    assert not torch.equal(again.images, first.images)
    assert len(data.load(labelled, **options | {"limit": 5})) == 5
    assert data.load(labelled, **options | {"channels": 1}).channels == 1


def test_grey_files_are_mapped_with_one_channel(tmp_path, monkeypatch):
    from fastgan.data import store

    monkeypatch.setattr(store, "BLOCK", 2000)
    for number in range(11):
        save(tmp_path / "set", f"{number:02d}.png", Image.fromarray(rng_pixels(16, 16) ^ number))
    mapped = data.load(tmp_path / "set", image_size=16, max_bytes=0, cache_dir=tmp_path / "cache")
    assert mapped.channels == 1 and mapped.mapped.stat().st_size == 128 + 11 * 256
    assert torch.equal(mapped.images, data.load(tmp_path / "set", image_size=16).images)


def test_default_cache_is_in_the_environment(labelled, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "elsewhere"))
    mapped = data.load(labelled, max_bytes=0)
    assert mapped.mapped.parent == tmp_path / "elsewhere" / "data"


def test_arrays_larger_than_memory(tmp_path):
    pixels = rng_pixels(40, 3, 8, 8)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "last.npy", pixels.transpose(0, 2, 3, 1).copy())
    for name in ("a.npy", "last.npy"):
        mapped = data.load(tmp_path / name, max_bytes=0)
        # A file that fits as it is becomes the memory map itself: nothing is written.
        assert mapped.mapped == tmp_path / name and np.array_equal(mapped.images.numpy(), pixels)
    (tmp_path / "b-ubyte").write_bytes(idx_bytes(pixels[:, 0]))
    assert data.load(tmp_path / "b-ubyte", max_bytes=0).mapped == tmp_path / "b-ubyte"
    half = data.load(tmp_path / "a.npy", max_bytes=0, image_size=4, limit=10, cache_dir=tmp_path / "c")
    assert half.mapped.parent == tmp_path / "c"
    assert torch.equal(half.images, data.load(tmp_path / "a.npy", image_size=4, limit=10).images)
    assert not data.load(torch.from_numpy(pixels), max_bytes=0).streamed


def test_mapped_files_are_never_written_to(tmp_path):
    np.save(tmp_path / "a.npy", rng_pixels(4, 3, 8, 8))
    before = (tmp_path / "a.npy").read_bytes()
    images = data.load(tmp_path / "a.npy", max_bytes=0)
    images.images.zero_()
    del images
    assert (tmp_path / "a.npy").read_bytes() == before


def test_a_full_disk_is_seen_before_decoding(labelled, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ValueError, match=r"0\.0 GiB free; set cache_dir"):
        data.load(labelled, max_bytes=0, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (123_456_789_012, 3, 4096, 4096)])
def test_npy_header(shape):
    header = npy_header(shape)
    assert len(header) == 128
    file = io.BytesIO(header)
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == (shape, False, np.dtype("u1"))


def test_prepare_keeps_labels_and_loads_at_once(labelled, tmp_path):
    seen = []
    out = data.prepare(labelled, tmp_path / "p" / "set.npy", image_size=16, progress=lambda *n: seen.append(n))
    assert seen[-1] == (31, 31)
    images, direct = data.load(out), data.load(labelled, image_size=16)
    assert torch.equal(images.images, direct.images) and torch.equal(images.labels, direct.labels)
    assert (images.classes, images.skipped, images.name) == (direct.classes, direct.skipped, "photos")
    data.prepare("fashion-mnist", out, limit=20)
    assert data.load(out).classes[9] == "Ankle boot" and len(data.load(out)) == 20
    assert np.load(out).shape == (20, 1, 28, 28)
    with pytest.raises(ValueError, match=r"must be a \.npy file"):
        data.prepare(labelled, tmp_path / "set.zip")


def test_free_memory_is_known_here():
    free = free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 1 << 50


def test_free_memory_of_a_control_group(tmp_path):
    from fastgan.data.memory import _available, _group_allowance

    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 1\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert _group_allowance(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert _group_allowance(tmp_path) is None and _group_allowance(tmp_path / "none") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert _available(tmp_path / "meminfo") == 5 * 1024


# ------------------------------------------------------------------------------------------------- batches


def numbered(count, labels=True, size=4):
    """Images whose first pixel is their number, brighter to the right."""
    ramp = torch.arange(size, dtype=torch.uint8) * 3
    images = (torch.arange(count).view(-1, 1, 1, 1) + ramp).expand(-1, 3, size, size).to(torch.uint8)
    return data.ImageSet(images.contiguous(), torch.arange(count) if labels else None)


def numbers(batch):
    """The numbers of the images in a batch, whichever way they are turned."""
    return data.to_uint8(batch).amin((1, 2, 3)).tolist()


def test_normalisation_is_exact():
    images = data.ImageSet(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    x, labels = next(images.batches(1))
    assert x.dtype == torch.float32 and labels is None
    assert x.min() == -1 and x.max() == 1
    expected = torch.arange(256, dtype=torch.float64).view(16, 16) / 127.5 - 1
    assert (x[0, 0].double() - expected).abs().max() <= 2**-24
    assert torch.equal(data.to_uint8(x), images.images)


def test_epochs_are_permutations():
    stream = numbered(20).batches(5)
    epochs = []
    for _ in range(3):
        got = []
        for _ in range(4):
            x, labels = next(stream)
            assert x.shape == (5, 3, 4, 4) and x.is_contiguous() and numbers(x) == labels.tolist()
            got += labels.tolist()
        assert sorted(got) == list(range(20))
        epochs.append(got)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(20))
    assert stream.epoch == 3 and iter(stream) is stream


def test_what_an_epoch_leaves_over():
    stream = numbered(10).batches(4)
    batches = [next(stream)[1].tolist() for _ in range(20)]
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert len(first) == len(second) == 4 and len({*first, *second}) == 8
    assert stream.epoch == 10
    stream = numbered(10).batches(4, drop_last=False)
    batches = [next(stream)[1].tolist() for _ in range(6)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    assert sorted(batches[0] + batches[1] + batches[2]) == list(range(10))


def test_sets_smaller_than_a_batch_train():
    stream = numbered(3).batches(8)
    drawn = [number for _ in range(3) for number in next(stream)[1].tolist()]
    assert len(drawn) == 24
    for start in range(0, 24, 3):
        assert sorted(drawn[start : start + 3]) == [0, 1, 2]
    assert len(next(numbered(3).batches(8, drop_last=False))[0]) == 3


def test_flips_mirror_half_of_the_images():
    images = numbered(200)
    plain, flipped = (images.batches(200, generator=torch.Generator().manual_seed(5), flip=f) for f in (False, True))
    turned = 0
    for _ in range(10):
        (x, y), (u, v) = next(plain), next(flipped)
        assert torch.equal(y, v), "flips leave the order as it is"
        same = (x == u).flatten(1).all(1)
        mirrored = (x.flip(-1) == u).flatten(1).all(1)
        assert (same ^ mirrored).all()
        turned += int(mirrored.sum())
    # 2,000 fair coins: 1,000 +- 22; six standard deviations.
    assert abs(turned - 1000) < 6 * 22.4


def test_layout_of_batches():
    x, _ = next(numbered(20).batches(4, channels_last=True))
    assert x.is_contiguous(memory_format=torch.channels_last) and x.shape == (4, 3, 4, 4)


def test_seeds():
    def first(seed):
        return next(numbered(50).batches(50, generator=torch.Generator().manual_seed(seed)))[1].tolist()

    assert first(1) == first(1) != first(2)
    torch.manual_seed(4)
    one, two = (next(numbered(50).batches(50))[1].tolist() for _ in range(2))
    torch.manual_seed(4)
    assert next(numbered(50).batches(50))[1].tolist() == one != two


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 25])
@pytest.mark.parametrize(
    ("count", "batch_size", "drop_last"), [(11, 4, True), (11, 4, False), (3, 8, True), (8, 4, True)]
)
def test_resumption_is_bit_exact(steps, count, batch_size, drop_last, tmp_path):
    def stream(seed):
        generator = torch.Generator().manual_seed(seed)
        return numbered(count).batches(batch_size, generator=generator, flip=True, drop_last=drop_last)

    original = stream(1)
    for _ in range(steps):
        next(original)
    torch.save(original.state_dict(), tmp_path / "state.pt")
    expected = [next(original) for _ in range(12)]
    resumed = stream(2)
    next(resumed)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for x, y in expected:
        u, v = next(resumed)
        assert torch.equal(x, u) and torch.equal(y, v)
    assert (resumed.epoch, resumed.position) == (original.epoch, original.position)


def test_saved_state_is_a_copy():
    stream = numbered(10).batches(3)
    next(stream)
    state = stream.state_dict()
    before = state["order"].clone()
    for _ in range(9):
        next(stream)
    assert torch.equal(state["order"], before)


def test_resumption_refuses_other_data():
    state = numbered(10).batches(3).state_dict()
    with pytest.raises(ValueError, match="saved state has 10 and images has 11"):
        numbered(11).batches(3).load_state_dict(state)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_batch_size_out_of_range(size):
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        numbered(4).batches(size)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "sentence"),
    [
        (torch.zeros(2, 3, 4, 4), None, None, "must be uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), None, None, "must be uint8"),
        (
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            torch.zeros(3, dtype=torch.long),
            None,
            "one for each image",
        ),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), None, "must be integers"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, -1]), None, "at least 0, got -1 to 0"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), ["a", "b"], "below the 2 classes"),
    ],
)
def test_image_set_checks_its_parts(images, labels, classes, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.ImageSet(images, labels, classes)


def test_repr_says_what_it_is():
    images = data.ImageSet(torch.zeros(2, 3, 4, 5, dtype=torch.uint8), name="n", skipped=[("a", "b")])
    assert repr(images) == "ImageSet(n: 2 images 3x4x5, on cpu, 1 files skipped)"


def test_batches_to_another_device_keep_the_images_where_they_are():
    """`meta` stands for a device that is not the images' own: what goes there is the batch alone."""
    images = data.ImageSet(numbered(6).images, torch.arange(6), device="meta")
    assert images.streamed and images.images.device.type == "cpu"
    x, labels = next(images.batches(4))
    assert x.device.type == labels.device.type == "meta" and x.shape == (4, 3, 4, 4)


@pytest.mark.gpu
def test_gpu_batches_equal_those_of_the_cpu_without_synchronising():
    home = data.load("emoji-64", limit=300)
    streams = [
        images.batches(64, generator=torch.Generator().manual_seed(2), flip=True)
        for images in (home, home.to("cuda"), data.ImageSet(home.images, home.labels, device="cuda"))
    ]
    assert [stream.source.streamed for stream in streams] == [False, False, True]
    for step in range(11):
        x, y = next(streams[0])
        for stream in streams[1:]:
            torch.cuda.set_sync_debug_mode("error" if step % 4 else "default")
            try:
                u, v = next(stream)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert u.is_cuda and torch.equal(u.cpu(), x) and torch.equal(v.cpu(), y)


@pytest.mark.gpu
def test_gpu_loading_respects_free_memory(monkeypatch):
    assert data.load("fashion-mnist", device="cuda").images.is_cuda
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 1000))
    images = data.load("fashion-mnist", device="cuda")
    assert not images.images.is_cuda and images.streamed and next(images.batches(4))[0].is_cuda


# ------------------------------------------------------------------------------------------------- inspect


def test_inspect_a_folder(tmp_path):
    for number in range(8):
        save(tmp_path, f"{'ab'[number % 2]}/{number}.png", Image.new("RGB", (70, 80), RED))
    save(tmp_path, "a/grey.png", Image.new("L", (64, 64)))
    save(tmp_path, "b/clear.png", Image.new("RGBA", (64, 64)))
    (tmp_path / "a" / "bad.png").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("x")
    found = data.inspect(tmp_path)
    assert found["images"] == 10 and found["kind"] == "folder" and found["examined"] == 11
    assert found["sizes"] == {"70x80": 8, "64x64": 2} and found["not_square"] == 8
    assert found["modes"] == {"RGB": 8, "L": 1, "RGBA": 1}
    assert found["short_side"] == {"min": 64, "median": 70, "max": 70}
    assert found["classes"] == {"a": 5, "b": 5} and found["transparent"] == 1
    assert found["unreadable"] == [("a/bad.png", "empty file")] and found["ignored"] == {".txt": 1}
    assert found["suggestion"] == {"image_size": 64, "channels": 3, "bytes": 10 * 3 * 64 * 64}
    assert json.loads(json.dumps(found))["images"] == 10
    report = str(found)
    for words in ("10 images", "70x80: 8", "a/bad.png: empty file", ".txt: 1", "image_size=64, channels=3"):
        assert words in report
    assert "--conditional trains" in report and "--augment colour,translation,cutout, since" in report


def test_inspect_lists_no_sizes_of_one_image_each(tmp_path):
    for number in range(9):
        save(tmp_path, f"{number}.png", Image.new("RGB", (64, 64 + number), RED))
    report = str(data.inspect(tmp_path))
    assert "sizes      9, no two images have the same\n" in report and "--conditional" not in report
    assert "64x64: 1, 64x" in str(data.inspect(tmp_path, limit=8))


def test_inspect_without_anything_readable(tmp_path):
    found = data.inspect(tmp_path)
    assert found["images"] == 0 and found["suggestion"] is None and "0 images" in str(found)


def test_inspect_bundled_and_arrays():
    assert data.inspect("fashion-mnist")["suggestion"]["image_size"] == 32
    assert data.inspect("emoji-64")["classes"]["Flags"] == 261
    assert data.inspect(torch.zeros(2, 3, 256, 200))["suggestion"]["image_size"] == 128


def test_inspect_a_sample(tmp_path):
    tree(tmp_path, [f"{number}.png" for number in range(9)])
    found = data.inspect(tmp_path, limit=3)
    assert found["examined"] == 3 and found["images"] == 9


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ([28], 32),
        ([64], 64),
        ([100], 64),
        ([120], 128),
        ([4000], 1024),
        ([5], 16),
        ([64, 512, 512, 512, 512], 512),
    ],
)
def test_suggested_size(sides, expected):
    from fastgan.data.inspection import _suggestion

    assert _suggestion(sides, False, 1)["image_size"] == expected


# --------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns", "padding"), [(7, 3, 2), (1, None, 0), (10, None, 1), (3, 8, 5)])
def test_grid_geometry(tmp_path, channels, count, columns, padding):
    pixels = torch.from_numpy(rng_pixels(count, channels, 5, 6))
    path = data.save_grid(pixels.float() / 127.5 - 1, tmp_path / "new" / "g.png", columns=columns, padding=padding)
    across = min(count, columns or int(np.ceil(np.sqrt(count))))
    down = -(-count // across)
    sheet = picture(path).reshape(down * (5 + padding) + padding, across * (6 + padding) + padding, -1)
    assert sheet.shape[-1] == channels
    rest = np.ones(sheet.shape[:2], bool)
    for number in range(count):
        top, left = padding + number // across * (5 + padding), padding + number % across * (6 + padding)
        assert np.array_equal(sheet[top : top + 5, left : left + 6], pixels[number].permute(1, 2, 0).numpy())
        rest[top : top + 5, left : left + 6] = False
    assert (sheet[rest] == 127).all()


def test_to_uint8_of_anything():
    x = torch.tensor([-1.0, 1.0, 0.0, -9.0, 9.0, float("nan"), float("inf"), -float("inf")])
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert data.to_uint8(x.to(dtype)).tolist() == [0, 255, 128, 0, 255, 0, 255, 0]
    x.requires_grad_()
    assert data.to_uint8(x).dtype == torch.uint8
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        data.to_uint8(torch.zeros(3, dtype=torch.long))


def test_grid_of_nan_and_of_strided_images(tmp_path):
    data.save_grid(torch.full((4, 3, 8, 8), float("nan")), tmp_path / "nan.png")
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    straight = data.make_grid(x)
    assert torch.equal(data.make_grid(x.contiguous(memory_format=torch.channels_last)), straight)
    assert torch.equal(data.make_grid(x.flip(0)[:2].flip(0)), data.make_grid(x[2:]))


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    [
        ((3, 8, 8), {}, r"\[N, 1 or 3, H, W\]"),
        ((2, 2, 8, 8), {}, r"\[N, 1 or 3, H, W\]"),
        ((0, 3, 8, 8), {}, "no dimension 0"),
        ((2, 3, 8, 8), {"columns": 0}, "columns must be at least 1"),
        ((2, 3, 8, 8), {"padding": -1}, "padding at least 0"),
    ],
)
def test_grid_arguments(tmp_path, shape, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.save_grid(torch.zeros(shape), tmp_path / "a.png", **options)
    assert list(tmp_path.iterdir()) == []


def test_grids_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = data.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / "a.png")
    before = path.read_bytes()

    def broken(self, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        data.save_grid(torch.ones(1, 3, 8, 8), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="one that Pillow writes"):
        data.save_grid(torch.ones(1, 3, 8, 8), tmp_path / "a.xyz")


def test_grid_formats(tmp_path):
    for name, kind in (("a", "PNG"), ("a.jpg", "JPEG"), ("a.webp", "WEBP")):
        data.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.format == kind


# -------------------------------------------------------------------------------------------------- import


FRESH = """
import sys
import fastgan.data
assert "PIL" not in sys.modules
from fastgan.data.decode import decode
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        print(*decode(file, 8, 3)[0].shape)
"""


def test_import_leaves_pillow_alone_and_the_first_image_is_decoded(tmp_path):
    files = [tmp_path / f"a.{kind}" for kind in ("png", "jpg", "webp")]
    for file in files:
        Image.new("RGB", (9, 12), (90, 10, 10)).save(file)
    done = subprocess.run([sys.executable, "-c", FRESH, *map(str, files)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "8 8 3\n" * 3, "")


def test_without_pillow(tmp_path, monkeypatch):
    tree(tmp_path, ["a.png"])
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert len(data.load("fashion-mnist", limit=5)) == 5
    with pytest.raises(ImportError, match="pip install pillow"):
        data.load(tmp_path)
