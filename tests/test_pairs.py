"""Image to image with pairs: their data, pix2pix against a step written out, its run, `fastgan translate`."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fastgan
from fastgan import models
from fastgan.cli import main
from fastgan.data.pairs import PairSet, load_pairs, made_from
from fastgan.domains import domain_of
from fastgan.training.assembly import assemble
from fastgan.training.rundir import read_log

TINY = {"image_size": 16, "batch_size": 2, "steps": 3, "log_every": 1, "sample_count": 12, "watch_every": 0}
NARROW = {"g_width": 4, "d_width": 4}


def picture(value, size=(16, 16), channels=3):
    return Image.fromarray(np.full((size[1], size[0], channels), value, np.uint8).squeeze())


@pytest.fixture
def folders(tmp_path):
    """Six pairs in two folders, a darker than b; and what is no pair."""
    root = tmp_path / "pairs"
    for folder, base in (("a", 10), ("b", 100)):
        (root / folder / "deep").mkdir(parents=True)
        for k in range(6):
            picture(base + k).save(root / folder / f"{k}.png")
    picture(50).save(root / "a" / "alone.png")
    picture(60).save(root / "b" / "deep" / "lonely.jpg")
    (root / "a" / "torn.png").write_bytes((root / "a" / "0.png").read_bytes()[:40])
    picture(70).save(root / "b" / "torn.png")
    picture(80, (32, 16)).save(root / "a" / "wide.png")
    picture(90, (16, 32)).save(root / "b" / "wide.png")
    return root


# ---- data -----------------------------------------------------------------------------------------------------------


def test_pairs_of_two_folders(folders, caplog):
    pairs = load_pairs(folders, image_size=16)
    assert len(pairs) == 6 and pairs.images.shape == (6, 6, 16, 16)
    assert [int(x) for x in pairs.sources[:, 0, 3, 3]] == list(range(10, 16))
    assert [int(x) for x in pairs.targets[:, 2, 3, 3]] == list(range(100, 106))
    reasons = dict(pairs.skipped)
    assert reasons["a/alone.png"] == "has no partner in b" and reasons["b/deep/lonely.jpg"] == "has no partner in a"
    assert "other proportions" in reasons["a/wide.png"] and reasons["a/torn.png"] and len(reasons) == 4
    assert caplog.text.count("4 files of pairs skipped") == 1
    turned = load_pairs(folders, image_size=16, direction="ba", source_channels=1)
    assert torch.equal(turned.sources[:, 0, 3, 3], pairs.targets[:, 0, 3, 3]) and turned.images.shape[1] == 4


def test_pairs_side_by_side(tmp_path):
    left, right = picture(20, (20, 20)), picture(220, (20, 20))
    both = Image.new("RGB", (40, 20))
    both.paste(left, (0, 0))
    both.paste(right, (20, 0))
    for name in ("x.png", "y.png"):
        both.save(tmp_path / name)
    picture(1).save(tmp_path / "square.png")
    pairs = load_pairs(tmp_path, image_size=16, source_channels=1)
    assert pairs.sources.shape == (2, 1, 16, 16) and (pairs.sources == 20).all() and (pairs.targets == 220).all()
    assert pairs.skipped == [("square.png", "16x16 is no pair side by side, which is wider than high")]


def test_no_pair_at_all(tmp_path):
    picture(1).save(tmp_path / "square.png")
    with pytest.raises(ValueError, match=r"must hold pairs, two folders .* 1 unreadable image"):
        load_pairs(tmp_path, image_size=16)
    with pytest.raises(ValueError, match="made must be one of auto, no, outlines, grey, negative, got 'sepia'"):
        load_pairs(tmp_path, image_size=16, made="sepia")
    with pytest.raises(ValueError, match="direction must be ab or ba"):
        load_pairs(tmp_path, image_size=16, direction="up")
    with pytest.raises(ValueError, match="a folder or a zip must hold the pairs"):
        load_pairs("emoji-64", image_size=16, made="no")


def test_sources_that_are_made():
    pictures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    pictures[:, 1, :, 4:] = 200
    grey = made_from(pictures, "grey", 1)
    assert int(grey[0, 0, 0, 7]) == round(0.587 * 200) and int(grey[0, 0, 0, 0]) == 0
    outlines = made_from(pictures, "outlines", 3)
    assert outlines.shape == (2, 3, 8, 8) and (outlines[..., 3] == 117).all() and (outlines[..., :3] == 0).all()
    assert torch.equal(made_from(pictures, "negative", 3), 255 - pictures)
    with pytest.raises(ValueError, match="negative of these pictures has 3 channels, the recipe wants 1"):
        made_from(pictures, "negative", 1)


# ---- the step -------------------------------------------------------------------------------------------------------


def test_the_step_is_the_papers(tmp_path):
    """D on (source, target) and (source, G(source)), G by D's updated verdict and 100 L1, in float64."""
    recipe = fastgan.recipes()["pix2pix"].replace(
        **TINY, model_options={**NARROW, "dropout": 0.0}, domain_options={"source_channels": 1}
    )
    torch.manual_seed(0)
    g, d = (m.double() for m in models.build("pix2pix", image_size=16, source_channels=1, **NARROW, dropout=0.0))
    plain = copy.deepcopy((g, d))
    domain = domain_of(recipe)
    g2, d2, step = assemble(recipe, torch.device("cpu"), networks=(g, d))
    x = torch.rand(2, 4, 16, 16, dtype=torch.float64) * 2 - 1
    metrics = step(*domain.inputs([(x, None)]))
    source, target = x[:, :1], x[:, 1:]
    pg, pd = plain
    g_adam, d_adam = (torch.optim.Adam(m.parameters(), 2e-4, betas=(0.5, 0.999)) for m in plain)
    fake = pg(source)
    d_loss = F.softplus(-pd(target, source)).mean() + F.softplus(pd(fake.detach(), source)).mean()
    d_loss.backward()
    d_adam.step()
    l1 = (fake - target).abs().mean()
    (F.softplus(-pd(fake, source)).mean() + 100 * l1).backward()
    g_adam.step()
    assert float(metrics["d_loss"]) == pytest.approx(d_loss.item(), rel=1e-6)
    assert float(metrics["extra_g_loss"]) == pytest.approx(100 * l1.item(), rel=1e-6)
    for mine, theirs in ((g2, pg), (d2, pd)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_extra_loss_that_reads_no_real_verdict_spares_the_pass():
    calls = []

    class Critic(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    class Free:
        reads_d_real = False

        def __call__(self, outputs):
            assert outputs.d_real is None
            return outputs.fake.square().mean()

    for extra, passes in ((Free(), 3), (lambda outputs: outputs.fake.square().mean(), 4)):
        calls.clear()
        g, d = nn.Linear(2, 2), Critic(2, 1)
        adams = [torch.optim.Adam(m.parameters()) for m in (g, d)]
        step = fastgan.GANStep(g, d, latent=2, g_optimizer=adams[0], d_optimizer=adams[1], extra_g_loss=extra)
        step(torch.zeros(4, 2))
        assert len(calls) == passes


# ---- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 64, 256])
def test_networks_by_size(size):
    with torch.device("meta"):
        g, d = models.build("pix2pix", image_size=size, channels=3, source_channels=1)
        x, source = torch.empty(2, 3, size, size), torch.empty(2, 1, size, size)
    assert g(source).shape == x.shape and d(x, source).dim() == 4
    if size == 256:  # the paper's: 70-pixel patches, 30 x 30 of them, eight stages each way
        assert d(x, source).shape == (2, 1, 30, 30) and len(g.downs) == 8 and len(g.ups) == 7
        assert sum(isinstance(m, nn.Dropout) for m in g.modules()) == 3
    with pytest.raises(ValueError, match="power of two"):
        models.build("pix2pix", image_size=48)


def test_a_patch_sees_its_pixels_alone():
    for layers, field in ((1, 16), (2, 34)):
        d = models.PatchGAN(image_size=64, channels=1, source_channels=0, width=4, layers=layers).eval()
        x = torch.rand(1, 1, 64, 64, requires_grad=True)
        verdict = d(x)
        middle = verdict[0, 0, verdict.shape[2] // 2, verdict.shape[3] // 2]
        seen = torch.autograd.grad(middle, x)[0][0, 0].abs().sum(0).nonzero()
        assert int(seen.max() - seen.min()) + 1 == field


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_from_a_folder_to_translations(folders, tmp_path, capsys):
    run, recipe = tmp_path / "run", fastgan.recipes()["pix2pix"].replace(**TINY, model_options=NARROW)
    recipe = recipe.replace(data=str(folders), eval_every=1, held_out=2)
    trainer = fastgan.Trainer(recipe, out=run, quiet=True)
    assert trainer.fit().reason == "steps" and len(trainer.samples) == 4
    assert torch.equal(trainer.noise[:, 0, 0, 0] * 127.5 + 127.5, torch.tensor([10.0, 13.0]))  # those held out
    records = read_log(run / "log.jsonl")
    assert records[1]["l1"] > 0 and all(r["extra_g_loss"] > 0 for r in records)
    with Image.open(sorted((run / "samples").glob("*.png"))[-1]) as sheet:
        assert sheet.size == (2 * 18 + 2, 3 * 18 + 2)  # two pairs; source, translation, target
    assert "Distance to the targets" in (run / "report.html").read_text()
    whole = [p.clone() for p in trainer.generator.parameters()]
    fastgan.Trainer(recipe.replace(steps=1), out=tmp_path / "parts", quiet=True).fit()
    parts = fastgan.Trainer(recipe, resume=tmp_path / "parts", quiet=True)
    parts.fit()
    assert all(torch.equal(a, b) for a, b in zip(whole, parts.generator.parameters(), strict=True))
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 2 and found["scores"]["l1"] == pytest.approx(records[-1]["l1"], rel=1e-3)
    assert main(["train", "--recipe=pix2pix", "--dry-run", "--set=image_size=16", "--set=batch_size=2"]) == 0
    assert main(["profile", "--recipe=pix2pix", "--steps=1", "--set=image_size=16", "--set=batch_size=2"]) == 0
    capsys.readouterr()
    assert main(["translate", "--run", str(run), "--input", str(folders / "a"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "8 pictures" in shown.out and "1 file left out" in shown.out and "torn.png: " in shown.err
    with Image.open(tmp_path / "out" / "wide.png") as made:
        assert made.size == (16, 16) and made.mode == "RGB"


def test_bad_translations_are_one_sentence(folders, tmp_path, capsys):
    recipe = fastgan.recipes()["pix2pix"].replace(**TINY, model_options=NARROW, data=str(folders))
    fastgan.Trainer(recipe.replace(steps=1), out=tmp_path / "run", quiet=True).fit()
    other = fastgan.recipes()["mlp-28"].replace(steps=1, batch_size=2, sample_count=4, watch_every=0)
    fastgan.Trainer(other, out=tmp_path / "faces", quiet=True).fit()
    capsys.readouterr()
    run, folder, out = f"--run={tmp_path}/run", f"--input={folders}/a", f"--out={tmp_path}/out"
    for words, message in (
        ([run, folder, out, "--direction=ba"], "--direction must be ab"),
        ([run, f"--input={tmp_path}/none", out], "must be a folder or a zip"),
        ([run, f"--input={tmp_path}/run/checkpoints", out], "--input must hold pictures"),
        ([run, folder, f"--out={folders}/a/0.png"], "--out must be a folder"),
        ([run, folder, f"--out={folders}/b/../a"], "--out must not be the folder of the input"),
        ([f"--run={tmp_path}/faces", folder, out], "must make pictures from pictures or sounds, mlp-28 does not"),
    ):
        assert main(["translate", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    for words in (["sample", "x.png"], ["interpolate", "x.gif"], ["export", "x.pt2", "--format=pt2"]):
        assert main([words[0], run, "--out", str(tmp_path / words[1]), *words[2:]]) == 2
        assert "use fastgan translate" in capsys.readouterr().err
    with pytest.raises(ValueError, match="augment and instance_noise must be left out"):
        domain_of(recipe.replace(augment="colour"))
    with pytest.raises(ValueError, match="pairs must be a PairSet"):
        fastgan.Trainer(recipe, out=tmp_path / "new", images=fastgan.data.load("emoji-64", image_size=16))


def some_pairs(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    planes = torch.randint(0, 256, (count, 2, 16, 16), generator=rng, dtype=torch.uint8)
    return PairSet(planes, source_channels=1)


class Memory(nn.Module):
    """Logits of pairs: high for those that it knows, low for made ones, and what it is told for all others."""

    def __init__(self, pairs, others):
        super().__init__()
        self.known = nn.Parameter(pairs.images.float().flatten(1))
        self.others = others

    def forward(self, x, sources):
        pairs = (torch.cat([sources, x], 1) * 127.5 + 127.5).round().flatten(1)
        known = (pairs[:, None] == self.known).all(2).any(1).float()
        return torch.where(x.flatten(1).std(1) == 0, -1.0, known + self.others * (1 - known))


@pytest.mark.parametrize(("others", "share"), [(1.0, 0.0), (-1.0, 1.0), (0.0, 0.5)])
def test_a_discriminator_that_knows_its_pairs_by_heart(others, share):
    class Grey(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, sources):
            return sources * self.weight

    recipe = fastgan.recipes()["pix2pix"].replace(**TINY, channels=1, held_out=10)
    domain = domain_of(recipe)
    known, held = domain.hold_out(some_pairs(40), 10)
    given = domain.given(known)
    found = domain.health(known, held).look(Grey(), Memory(known, others), given.z, None)
    assert found["overfit"] == pytest.approx(share)
    assert "overfit" not in domain.health(known, None).look(Grey(), Memory(known, others), given.z, None)


def test_a_run_with_held_out_pairs_looks_at_them(tmp_path):
    recipe = fastgan.recipes()["pix2pix"].replace(**{**TINY, "watch_every": 1, "channels": 1}, model_options=NARROW)
    trainer = fastgan.Trainer(recipe.replace(held_out=8), out=tmp_path / "run", images=some_pairs(24), quiet=True)
    trainer.fit()
    assert all("overfit" in record for record in read_log(tmp_path / "run" / "log.jsonl"))


def test_pairs_given_from_memory(tmp_path):
    pairs = PairSet(torch.randint(0, 256, (5, 6, 16, 16), dtype=torch.uint8), 3)
    recipe = fastgan.recipes()["pix2pix"].replace(**TINY, model_options=NARROW, flip=True)
    assert fastgan.Trainer(recipe, out=tmp_path / "run", images=pairs, quiet=True).fit().step == 3
    with pytest.raises(ValueError, match="source_channels must leave planes for the target, got 6 of 6"):
        PairSet(pairs.images, 6)
