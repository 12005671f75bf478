"""Directions in latent space and projection, on generators whose answers are known."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_run import TINY, noise, trainer
from torch import nn

import fastgan
from fastgan import data
from fastgan.cli import main
from fastgan.cli.interpolate import _training_images
from fastgan.domains import domain_of
from fastgan.training import sampling
from fastgan.training.latent import class_direction, class_directions, principal_directions, project
from fastgan.training.nearest import nearest_images


class Linear(nn.Module):
    """Pictures [N, 1, 4, 4] = W z, where latent k moves pixel k, less with each k."""

    def __init__(self, latent=5):
        super().__init__()
        weight = torch.zeros(16, latent)
        weight[range(latent), range(latent)] = 0.5 ** torch.arange(latent)
        self.weight = nn.Parameter(weight)

    def forward(self, z, labels=None):
        pictures = z @ self.weight.T
        if labels is not None:
            pictures = pictures + labels[:, None]
        return pictures.view(-1, 1, 4, 4)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_principal_directions_of_a_linear_generator():
    found = principal_directions(Linear(), normal(4000, 5), count=3)
    assert torch.allclose(found.norm(dim=1), torch.ones(3))
    assert torch.allclose(found.abs(), torch.eye(5)[:3], atol=0.1)


@pytest.mark.parametrize("convert", [False, True])
def test_principal_directions_of_activations(convert):
    """The first layer moves latent 0 most, and the second one undoes it: pictures and activations disagree."""
    scales = 0.5 ** torch.arange(5.0)
    generator = nn.Sequential(nn.Linear(5, 5), nn.LeakyReLU(0.5), nn.Linear(5, 5), nn.Unflatten(1, (5, 1, 1)))
    with torch.no_grad():
        for layer, weight in ((generator[0], scales.diag()), (generator[2], scales.pow(-2).diag())):
            layer.weight.copy_(weight)
            layer.bias.zero_()
    generator = fastgan.convert(generator) if convert else generator
    found = principal_directions(generator, normal(4000, 5), count=2, of="activations")
    assert torch.allclose(found.abs(), torch.eye(5)[:2], atol=0.1)
    found = principal_directions(generator, normal(4000, 5), count=2)
    assert torch.allclose(found.abs(), torch.eye(5)[[4, 3]], atol=0.1)
    assert not any(m._forward_pre_hooks for m in generator.modules())


def test_the_direction_of_a_class():
    z = normal(4000, 5)
    assert torch.allclose(class_direction(z, z[:, 2] > 0), torch.eye(5)[2], atol=0.06)


@pytest.mark.parametrize("labelled", [False, True])
def test_projection_finds_the_latents(labelled):
    generator = Linear()
    z = normal(6, 5)
    labels = torch.tensor([0, 1, 2, 0, 1, 2]) if labelled else None
    before = generator.weight.detach().clone()
    found, error = project(generator, generator(z, labels).detach(), labels, starts=normal(64, 5) * 0.5, steps=400)
    assert torch.allclose(found[:, :3], z[:, :3], atol=0.02) and error.max() < 1e-4
    assert torch.equal(generator.weight, before) and generator.weight.grad is None and generator.training


def test_wrong_questions():
    with pytest.raises(ValueError, match="there must be 1 to 3 of 4 latents, got 4"):
        principal_directions(Linear(), normal(4, 5), count=4)
    with pytest.raises(ValueError, match='of must be "pictures" or "activations", got \'pixels\''):
        principal_directions(Linear(), normal(4, 5), count=2, of="pixels")
    with pytest.raises(ValueError, match="must have two layers for activations, got Linear"):
        principal_directions(Linear(), normal(4, 5), count=2, of="activations")
    with pytest.raises(ValueError, match="both sides must have latents, got 4 of 4 inside"):
        class_direction(normal(4, 5), torch.ones(4, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"images must be as the generator's, \[C, H, W\] = \[1, 4, 4\], got \[1, 3, 3\]"
    ):
        project(Linear(), torch.zeros(1, 1, 3, 3), starts=normal(2, 5))


def test_interpolate_along_components_and_through_images(tmp_path, capsys):
    with fastgan.backend("reference"):
        trainer(noise(), tmp_path / "run", TINY.replace(steps=1)).fit()
    Image.new("RGB", (20, 12), (90, 10, 10)).save(tmp_path / "picture.png")
    (tmp_path / "text.png").write_text("no picture")

    def walk(*options):
        command = ["interpolate", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "walk.png")]
        return main([*command, "--walks=2", "--stops=2", "--frames=3", *options]), capsys.readouterr().err

    assert walk("--along", "components") == (0, "")
    with Image.open(tmp_path / "walk.png") as sheet:
        assert sheet.size == (3 * 10 + 2, 2 * 10 + 2)
    assert walk("--along", "activations") == (0, "")
    assert walk("--image", str(tmp_path / "picture.png")) == (0, "")
    code, said = walk("--nearest")
    assert code == 2 and "--nearest needs the run's images in files, they were given in Python" in said
    for options, message in (
        (["--image", str(tmp_path / "text.png")], "--image must be a readable image"),
        (["--image", "absent.png"], "absent.png is not: no such file"),
        (["--image", "a.png", "--along", "components"], "--image goes with --along latents"),
        ([f"--image={tmp_path}/picture.png"] * 5, "at most 4 times"),
        (["--along", "rivers"], "invalid choice: 'rivers'"),
    ):
        code, said = walk(*options)
        assert code == 2 and message in said


def test_interpolate_with_the_nearest_training_images(tmp_path, capsys):
    """A generator of training images has each of them under itself."""
    recipe = TINY.replace(steps=1, data="fashion-mnist", image_size=8, held_out=5000)
    with fastgan.backend("reference"):
        trainer(None, tmp_path / "run", recipe).fit()
    command = ["interpolate", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "walk.png")]
    assert main([*command, "--walks=2", "--stops=2", "--frames=3", "--nearest"]) == 0
    with Image.open(tmp_path / "walk.png") as sheet:
        assert sheet.size == (3 * 10 + 2, 2 * 18 + 2)
    assert main([*command[:-1], str(tmp_path / "walk.gif"), "--walks=2", "--stops=2", "--frames=2", "--nearest"]) == 0
    capsys.readouterr()
    images = _training_images(domain_of(recipe))
    assert len(images) == 5000  # those held out are no training images
    some = images[[3, 1700, 4999]]
    found = nearest_images(torch.cat([images[:200], some]), some.float() / 127.5 - 1)
    assert torch.equal(data.to_uint8(found), some)
    with pytest.raises(ValueError, match="samples must be finite"):
        nearest_images(images, torch.full((1, 1, 8, 8), float("nan")))


OTHERS = {  # domains of samples that are no images: options of a run, and the size of a frame of a walk
    "chargan": (["--set=model_options.width=2", "--set=domain_options.length=8"], (8 * 7, 12)),
    "wavegan": (["--set=model_options.g_width=2", "--set=domain_options.length=256", "--set=d_steps=1"], None),
    "clip-32": (["--set=model_options.g_width=2", "--set=image_size=16", "--set=domain_options.frames=4"], (64, 16)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_interpolate_walks_through_what_is_no_image(name, tmp_path, capsys):
    options, size = OTHERS[name]
    run, out = str(tmp_path / "run"), str(tmp_path / "walk.png")
    tiny = ["--steps=1", "--batch-size=2", "--backend=reference", "--quiet", "--device=cpu", "--set=sample_count=2"]
    assert main(["train", "--recipe", name, f"--out={run}", *tiny, "--set=eval_every=0", *options]) == 0
    command = ["interpolate", "--run", run, "--walks=2", "--stops=2", "--frames=3"]
    assert main([*command, "--out", out]) == 0
    if size:
        with Image.open(out) as sheet:
            assert sheet.size == (3 * (size[0] + 2) + 2, 2 * (size[1] + 2) + 2)
    assert main([*command, "--out", str(tmp_path / "walk.gif"), "--along=components"]) == 0
    for option in (["--nearest"], ["--image", "a.png"], ["--along", "classes"]):
        capsys.readouterr()
        assert main([*command, "--out", out, *option]) == 2
        said = capsys.readouterr().err
        assert f"{' '.join(option[:1] if option[0] != '--along' else option)} must be left out, {name} makes" in said


class Shades(nn.Module):
    """Pictures [N, 1, 8, 8]: dark where latent 1 is below 0, bright above."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z):
        return (self.scale * 0.9 * z[:, 1].sign())[:, None, None, None].expand(-1, 1, 8, 8)


def test_directions_towards_classes_of_the_nearest_images():
    images = torch.cat([torch.full((3, 1, 8, 8), shade, dtype=torch.uint8) for shade in (10, 245, 128)])
    labels = torch.tensor([4, 4, 4, 7, 7, 7, 9, 9, 9])
    found = class_directions(Shades(), normal(2000, 5), images, labels)
    assert list(found) == [4, 7]  # no picture is nearest to a grey image
    assert torch.allclose(found[7], torch.eye(5)[1], atol=0.08) and torch.allclose(found[4], -found[7])
    assert class_directions(Shades(), normal(8, 5), images[:3], labels[:3]) == {}


class Two(nn.Module):
    """One of two images, by the sign of latent 1."""

    def __init__(self, below, above):
        super().__init__()
        self.below, self.above = nn.Parameter(below), nn.Parameter(above)

    def forward(self, z):
        return torch.where(z[:, 1, None, None, None] < 0, self.below, self.above)


def test_interpolate_along_classes(tmp_path, capsys, monkeypatch):
    recipe = TINY.replace(steps=1, data="fashion-mnist", image_size=8)
    with fastgan.backend("reference"):
        trainer(None, tmp_path / "run", recipe).fit()
        trainer(noise(), tmp_path / "alike", TINY.replace(steps=1, data=str(tmp_path))).fit()

    def walk(run, *options):
        command = ["interpolate", "--run", str(tmp_path / run), "--out", str(tmp_path / "walk.png"), "--walks=2"]
        return main([*command, "--frames=3", "--along", "classes", *options]), capsys.readouterr()

    code, said = walk("run")
    assert code == 2 and "pictures of two classes or more, this run's are all alike" in said.err
    config = sampling.load_generator(tmp_path / "run", device="cpu")[1]
    images = fastgan.data.load("fashion-mnist", image_size=8, limit=2000)
    two = [images.images[(images.labels == k).nonzero()[0, 0]] / 127.5 - 1 for k in (0, 1)]
    with monkeypatch.context() as patched:
        patched.setattr(sampling, "load_generator", lambda *_, **__: (Two(*two), config))
        code, said = walk("run")
    assert (
        code == 0
        and said.out.startswith(f"towards {images.classes[0]}, {images.classes[1]}\n")
        and "2 walks of 3 frames" in said.out
    )
    with Image.open(tmp_path / "walk.png") as sheet:
        assert sheet.size == (3 * 10 + 2, 2 * 10 + 2)
    code, said = walk("run", "--image", "a.png")
    assert code == 2 and "--image goes with --along latents" in said.err
    Image.new("L", (9, 9), 50).save(tmp_path / "picture.png")
    code, said = walk("alike")
    assert code == 2 and "--along classes needs images with classes" in said.err
