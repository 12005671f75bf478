"""Labels: conditional networks, runs, grids with a row a class, labels from a CSV, and what wrong ones say."""

from __future__ import annotations

import functools

import pytest
import torch
from PIL import Image
from test_models import SMALL
from tiny_run import TINY, assert_same_state, trainer

import fastgan
from fastgan import models
from fastgan.cli import main
from fastgan.data.imageset import ImageSet
from fastgan.export import export
from fastgan.training.sampling import class_rows, draw
from fastgan.training.trainer import Trainer

CLASSES = 3
LABELLED = TINY.replace(conditional=True, eval_every=2)


@pytest.fixture(autouse=True)
def reference():
    with fastgan.backend("reference"):
        yield


def labelled(classes=("dark", "grey", "light")) -> ImageSet:
    """Twelve grey pictures of 8x8, lighter with their class."""
    labels = torch.arange(12) % len(classes)
    pixels = (labels * 80 + 20).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).to(torch.uint8).contiguous()
    return ImageSet(pixels, labels, classes, name="greys")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    for label, value in (("dark", 0), ("light", 200)):
        (folder / "data" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (8, 8), value + i).save(folder / "data" / label / f"{i}.png")
    with fastgan.backend("reference"):
        trainer(None, folder / "run", LABELLED.replace(data=str(folder / "data"))).fit()
    return folder / "run"


@pytest.mark.parametrize("name", SMALL)
def test_every_model_takes_labels_and_they_matter(name):
    torch.manual_seed(0)
    options = SMALL[name] | {"classes": CLASSES}
    generator, discriminator = (m.double() for m in models.build(name, **options))
    with torch.no_grad():  # class embeddings begin alike: as after some training
        for network in (generator, discriminator):
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    z, labels = torch.randn(6, options["latent"], dtype=torch.double), torch.arange(6) % CLASSES
    images = generator(z, labels)
    logits = discriminator(images, labels)
    assert images.shape == (6, options["channels"], options["image_size"], options["image_size"])
    assert logits.shape == (6,)
    assert not torch.allclose(images, generator(z, labels.flip(0)))
    assert not torch.allclose(logits, discriminator(images, labels.flip(0)))
    logits.sum().backward()
    assert all(p.grad is not None for m in (generator, discriminator) for p in m.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_a_converted_step_is_the_plain_one(name):
    """Two steps with R1 on converted networks are the textbook's on plain ones, in float64."""
    options = SMALL[name] | {"classes": CLASSES} | ({"dropout": 0.0} if name == "dcgan-28" else {})
    labels = torch.tensor([0, 1, 2, 2])
    real = torch.randn(4, options["channels"], options["image_size"], options["image_size"], dtype=torch.double)
    # of sagan-32 the attention alone: its thirty traced parts take 13 s, and sngan-32 has their like
    ours = functools.partial(fastgan.convert, trace="off" if name == "sagan-32" else "auto")
    results = []
    for convert in (ours, lambda module: module):
        torch.manual_seed(0)
        networks = [convert(m.double()) for m in models.build(name, **options)]
        adams = [torch.optim.SGD(m.parameters(), 1e-2) for m in networks]
        step = fastgan.GANStep(
            *networks, latent=options["latent"], g_optimizer=adams[0], d_optimizer=adams[1], penalty="r1"
        )
        torch.manual_seed(1)
        for _ in range(2):
            found = step(real, labels)
        results.append([float(found[k]) for k in ("d_loss", "g_loss", "penalty")])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_class_affine_is_its_formula():
    affine = models.ClassAffine(2, 3)
    with torch.no_grad():
        affine.weight.weight.normal_()
        affine.bias.weight.normal_()
    x, labels = torch.randn(4, 3, 2, 2), torch.tensor([1, 0, 0, 1])
    for n, label in enumerate(labels):
        want = affine.weight.weight[label].view(3, 1, 1) * x[n] + affine.bias.weight[label].view(3, 1, 1)
        assert torch.allclose(affine(x, labels)[n], want)


def test_projection_is_its_formula():
    torch.manual_seed(0)
    _, d = models.build("dcgan-64", image_size=16, d_width=4, classes=2)
    x, labels = torch.randn(3, 3, 16, 16), torch.tensor([1, 0, 1])
    h = d.features(x)
    want = d.head(h).flatten() + (d.embedding.weight[labels] * h.sum((2, 3))).sum(1)
    assert torch.allclose(d(x, labels), want)


@pytest.mark.usefixtures("unraced")
def test_a_resumed_conditional_run_is_the_run_that_was_not_stopped(tmp_path):
    images = labelled()
    whole = trainer(images, tmp_path / "whole", LABELLED)
    whole.fit()
    trainer(images, tmp_path / "parts", LABELLED.replace(steps=3)).fit()
    parts = Trainer(LABELLED, resume=tmp_path / "parts", images=images, quiet=True)
    parts.fit()
    assert_same_state(whole, parts)
    assert whole.recipe.classes == 3 and whole.config["classes"] == ["dark", "grey", "light"]
    assert whole.sample_labels.tolist() == [0, 1, 2]  # four samples asked for: a row a class


def test_sample_grids_have_a_row_a_class(run, tmp_path, capsys):
    def grid(*options):
        assert main(["sample", "--run", str(run), "--out", str(tmp_path / "grid.png"), *options]) == 0
        with Image.open(tmp_path / "grid.png") as sheet:
            return sheet.size, sheet.tobytes()

    (width, height), _ = grid("--n", "6")
    assert (width, height) == (3 * 10 + 2, 2 * 10 + 2)
    assert grid("--n", "4", "--label", "light") == grid("--n", "4", "--label", "1")
    assert grid("--n", "4", "--label", "light") != grid("--n", "4", "--label", "dark")
    assert grid("--n", "4", "--best") is not None
    for command in (
        ["interpolate", "--out", "w.png", "--label", "1", "--frames", "3", "--best"],
        ["evaluate", "--best"],
    ):
        command = [str(tmp_path / c) if c == "w.png" else c for c in command]
        assert main([command[0], "--run", str(run), *command[1:]]) == 0


def test_an_exported_conditional_generator_takes_labels(run, tmp_path):
    generator, _ = fastgan.training.sampling.load_generator(run)
    said = export(generator, tmp_path / "g.pt2", format="pt2", latent=5, classes=2)
    z, labels = torch.randn(3, 5), torch.tensor([0, 1, 1])
    found = torch.export.load(tmp_path / "g.pt2").module()(z, labels)
    assert "read back" in said and torch.allclose(found, draw(generator, z, labels), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label", "green"], "it must be below 2 or one of dark, light, got 'green'"),
        (["--label", "2"], "it must be below 2 or one of dark, light, got '2'"),
        (["--label", "-1"], "got '-1'"),
    ],
)
def test_wrong_labels(run, tmp_path, capsys, options, message):
    assert main(["sample", "--run", str(run), "--out", str(tmp_path / "a.png"), f"{options[0]}={options[1]}"]) == 2
    assert message in capsys.readouterr().err


def test_what_conditional_runs_refuse(tmp_path):
    unlabelled = ImageSet(labelled().images, name="bare")
    with pytest.raises(ValueError, match=r"must have labels, bare has none; put the images .* or give --labels"):
        trainer(unlabelled, tmp_path / "a", LABELLED)
    with pytest.raises(ValueError, match="the images must have 5 classes, greys has 3"):
        trainer(labelled(), tmp_path / "a", LABELLED.replace(classes=5))
    with pytest.raises(ValueError, match="classes must be 0 unless the run is conditional, got 3"):
        TINY.replace(classes=3)
    with pytest.raises(ValueError, match=r"classes must be 0 \(no labels\) or at least 2, got 1"):
        models.build("dcgan-28", classes=1)
    assert not (tmp_path / "a").exists()


def test_best_needs_an_evaluation(tmp_path, capsys):
    trainer(labelled(), tmp_path / "run", TINY.replace(steps=1)).fit()
    assert main(["sample", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "a.png"), "--best"]) == 2
    assert "must hold best/generator.pt, it does not; train with --eval-every" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- labels of a CSV


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


def test_labels_of_a_csv(folder, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n0.png,10\n./1.png,9\npictures/2.png,10\n2.png,10\n3.png,9\n")
    images = fastgan.data.load(folder, image_size=8, labels=table)
    assert images.classes == ["9", "10"] and images.labels.tolist() == [1, 0, 1, 0]
    mapped = fastgan.data.load(folder, image_size=8, labels=table, max_bytes=0, cache_dir=tmp_path / "cache")
    assert mapped.labels.tolist() == [1, 0, 1, 0]
    table.write_text("0.png,a\n1.png,a\n2.png,b\n3.png,b\n")  # the kept pixels keep no labels of another table
    mapped = fastgan.data.load(folder, image_size=8, labels=table, max_bytes=0, cache_dir=tmp_path / "cache")
    assert mapped.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.png,a\n1.png,b\n2.png,a\n", "every image must have a label, .* has none for 3.png"),
        ("0.png\n", "each line of labels must read FILE,LABEL, line 1 of .* is '0.png'"),
        ("0.png,a\n0.png,b\n", "0.png in .* has two labels, 'a' and 'b'"),
        ("0.png,\n", "0.png in .* has no label"),
        ("file,label\n", "labels must name at least one file"),
    ],
)
def test_wrong_csv(folder, tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        fastgan.data.load(folder, image_size=8, labels=tmp_path / "labels.csv")


def test_no_csv_and_no_files(tmp_path, folder):
    with pytest.raises(ValueError, match="labels must be a readable CSV"):
        fastgan.data.load(folder, labels=tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="labels go with a folder or a zip"):
        fastgan.data.load("fashion-mnist", labels=tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("count", "classes", "each", "columns"),
    [(64, 10, 6, 6), (64, 2, 32, 16), (64, 3, 21, 21), (34, 2, 17, 17), (16, 1, 16, 16), (60, 2, 30, 15), (3, 9, 1, 1)],
)
def test_sheets_of_few_classes_are_not_wider_than_can_be_seen(count, classes, each, columns):
    labels, found = class_rows(count, classes)
    assert labels.tolist() == [k for k in range(min(classes, count)) for _ in range(each)] and found == columns
