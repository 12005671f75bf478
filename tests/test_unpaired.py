"""Image to image without pairs: two sides, CycleGAN's step written out, its history of fakes, its run both ways."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fastgan
from fastgan import models
from fastgan.cli import main
from fastgan.data.pairs import UnpairedSet, load_unpaired
from fastgan.domains import domain_of
from fastgan.training.assembly import assemble
from fastgan.training.history import History
from fastgan.training.rundir import read_log

TINY = {"image_size": 16, "batch_size": 2, "steps": 4, "log_every": 1, "sample_count": 4, "watch_every": 0}
NARROW = {"g_width": 4, "d_width": 4, "blocks": 1}


@pytest.fixture
def sides(tmp_path):
    """Nine dark pictures in a, twelve bright ones in b, a torn file, and a folder around all."""
    for folder, count, base in (("trainA", 9, 10), ("trainB", 12, 150)):
        (tmp_path / "all" / folder).mkdir(parents=True)
        for k in range(count):
            pixels = np.random.default_rng(k).integers(base, base + 80, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "all" / folder / f"{k:02}.png")
    (tmp_path / "all" / "trainB" / "torn.png").write_bytes(b"no picture")
    return tmp_path / "all"


def recipe_of(**changes):
    return fastgan.recipes()["cyclegan"].replace(**TINY, model_options=NARROW).replace(**changes)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_two_sides_of_a_folder(sides, caplog):
    both = load_unpaired(sides, image_size=16)
    assert (len(both.a), len(both.b), len(both)) == (9, 12, 12)
    assert both.a.images.max() < 128 < both.b.images.float().mean() and both.a.images.shape[1:] == (3, 16, 16)
    assert both.skipped == [("trainB/torn.png", "not in an image format that is read")]
    assert caplog.text.count("1 file of all skipped") == 1


def test_no_two_sides(sides):
    with pytest.raises(ValueError, match="must hold two folders of pictures, one a side; it has 9 pictures"):
        load_unpaired(sides / "trainA", image_size=16)
    with pytest.raises(ValueError, match="made must be one of auto, no, outlines"):
        load_unpaired(sides, image_size=16, made="paint")
    with pytest.raises(ValueError, match="a folder or a zip must hold both sides"):
        load_unpaired("emoji-64", image_size=16, made="no")


def test_sides_that_are_made_share_no_picture():
    images = fastgan.data.load("fashion-mnist", image_size=16, channels=1)
    both = load_unpaired("fashion-mnist", image_size=16, channels=1, made="negative")
    assert torch.equal(255 - both.a.images, images.images[::2]) and torch.equal(both.b.images, images.images[1::2])


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"identity": 0.5}], ids=["the recipe's", "for paintings"])
def test_the_step_is_the_papers(options):
    """Both generators and both critics updated as the paper's code does, in float64: LSGAN, cycle and identity."""
    torch.manual_seed(0)
    g, d = (m.double() for m in models.build("cyclegan", image_size=16, **NARROW))
    (ab, ba), (of_b, of_a) = (copy.deepcopy((m[0], m[1])) for m in (list(g.children()), list(d.children())))
    recipe = recipe_of()
    recipe = recipe.replace(domain_options=recipe.domain_options | options)
    domain = domain_of(recipe)
    mine, critics, step = assemble(recipe, torch.device("cpu"), networks=(g, d))
    a, b = (torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1 for _ in range(2))
    metrics = step(*domain.inputs([(a, b)]))

    adam = lambda *ms: torch.optim.Adam(itertools.chain(*(m.parameters() for m in ms)), 2e-4, betas=(0.5, 0.999))
    g_adam, d_adam = adam(ab, ba), adam(of_b, of_a)
    fake_b, fake_a = ab(a), ba(b)
    d_loss = 0
    for critic, real, fake in ((of_b, b, fake_b), (of_a, a, fake_a)):
        d_loss = d_loss + 0.5 * ((critic(real) - 1).square().mean() + critic(fake.detach()).square().mean())
    d_loss.backward()
    d_adam.step()
    # the paper's weights; half of everything, as the step's LSGAN is
    g_loss = (of_b(fake_b) - 1).square().mean() + (of_a(fake_a) - 1).square().mean()
    cycle = 10 * (F.l1_loss(ba(fake_b), a) + F.l1_loss(ab(fake_a), b))
    if options:
        cycle = cycle + 5 * (F.l1_loss(ab(b), b) + F.l1_loss(ba(a), a))
    (0.5 * (g_loss + cycle)).backward()
    g_adam.step()
    assert float(metrics["d_loss"]) == pytest.approx(d_loss.item(), rel=1e-6)
    assert float(metrics["g_loss"]) == pytest.approx(0.5 * g_loss.item(), rel=1e-6)
    assert float(metrics["extra_g_loss"]) == pytest.approx(0.5 * cycle.item(), rel=1e-6)
    for ours, theirs in ((mine.ab, ab), (mine.ba, ba), (critics.of_b, of_b), (critics.of_a, of_a)):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_history_of_fakes():
    torch.manual_seed(0)
    history, seen = History(4), []
    for step in range(200):
        fake = torch.arange(step * 3.0, step * 3 + 3).view(3, 1, 1, 1)
        judged = history(fake)
        assert judged.shape == fake.shape
        if step == 0:
            assert torch.equal(judged, fake)  # it fills first
        seen += [int(new) - int(old) for new, old in zip(fake.flatten(), judged.flatten(), strict=True)]
    later = torch.tensor(seen[30:])
    assert (later >= 0).all() and 0.4 < (
        later == 0
    ).double().mean() < 0.6  # itself half of the time, else an earlier one
    assert (
        4 < later[later > 0].double().mean() < 14
    )  # the mean age of 4 that are replaced at random half of the time is 8
    assert len({int(x) for x in history.state_dict()["kept"].flatten()}) == 4
    with pytest.raises(ValueError, match="size must be at least 1"):
        History(0)


def test_a_history_goes_on_from_its_state():
    first = History(3)
    for k in range(5):
        first(torch.full((1, 2), float(k)))
    state = first.state_dict()
    second = History(3)
    second.load_state_dict(state, torch.device("cpu"))
    new = torch.arange(40.0).view(20, 2)
    with torch.random.fork_rng():
        one = first(new)
    assert torch.equal(one, second(new)) and not torch.equal(one, new)


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 256])
def test_networks_by_size(size):
    with torch.device("meta"):
        g, d = models.build("cyclegan", image_size=size)
        both = torch.empty(1, 6, size, size)
    assert g(both).shape == both.shape and len(d(both)["logits"]) == 2
    blocks = sum(isinstance(m, models.cyclegan.ResidualBlock) for m in g.ab.modules())
    assert blocks == (9 if size == 256 else 6) and not any(isinstance(m, nn.BatchNorm2d) for m in g.modules())
    if size == 256:  # 11.378 million parameters a generator and 2.765 a critic, as the paper's code prints
        assert sum(p.numel() for p in g.ab.parameters()) == 11_378_179
        assert sum(p.numel() for p in d.of_a.parameters()) == 2_764_737 and d(both)["logits"][0].shape[2:] == (30, 30)


def test_a_generator_sees_how_bright_a_flat_thing_is():
    """Instance norm takes the deviation of a plane away, so that all flat things of one form look the same to it."""
    form = torch.zeros(1, 1, 32, 32)
    form[..., 8:24, 10:22] = 1
    moved = {}
    for norm in ("instance", fastgan.recipes()["cyclegan"].model_options["norm"]):
        torch.manual_seed(0)
        g, _ = models.build("cyclegan", image_size=32, channels=1, g_width=16, d_width=16, blocks=3, norm=norm)
        with torch.no_grad():
            dark, bright = (g.ab(contrast * form - 1)[0, 0, 16, 16] for contrast in (0.5, 1.8))
        moved[norm] = abs(float(dark - bright))
    assert moved["layer"] > 0.1 > 5 * moved["instance"]
    with pytest.raises(ValueError, match="norm: it must be batch, instance or layer, got 'group'"):
        models.build("cyclegan", image_size=32, norm="group")


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unraced")
def test_a_run_both_ways(sides, tmp_path, capsys):
    recipe = recipe_of(data=str(sides), eval_every=2, domain_options={"history": 3})
    whole = fastgan.Trainer(recipe, out=tmp_path / "run", quiet=True)
    assert whole.fit().reason == "steps"
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert {"kcd", "kcd_ab", "kcd_ba", "cycle", "extra_g_loss"} <= records[-1].keys()
    with Image.open(sorted((tmp_path / "run" / "samples").glob("*.png"))[-1]) as sheet:
        assert sheet.size == (4 * 18 + 2, 4 * 18 + 2)  # rows: a, a to b, b, b to a
    fastgan.Trainer(recipe.replace(steps=3), out=tmp_path / "parts", quiet=True).fit()
    parts = fastgan.Trainer(recipe, resume=tmp_path / "parts", quiet=True)
    parts.fit()
    for network in ("generator", "discriminator"):
        ours, theirs = (getattr(run, network).parameters() for run in (whole, parts))
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    for direction in ("ab", "ba"):
        out = tmp_path / direction
        words = ["translate", "--run", str(tmp_path / "run"), "--input", str(sides / "trainB"), "--out", str(out)]
        assert main([*words, "--direction", direction]) == 0
        assert "12 pictures" in capsys.readouterr().out and len(list(out.glob("*.png"))) == 12
    ab, ba = (np.asarray(Image.open(tmp_path / d / "03.png")) for d in ("ab", "ba"))
    assert ab.shape == (16, 16, 3) and (ab != ba).any()


def test_settings_that_cannot_be_meant(sides, tmp_path):
    with pytest.raises(ValueError, match="held_out must be 0 without pairs"):
        fastgan.Trainer(recipe_of(data=str(sides), held_out=2), out=tmp_path / "run")
    with pytest.raises(ValueError, match="must be an UnpairedSet"):
        fastgan.Trainer(recipe_of(), out=tmp_path / "run", images=fastgan.data.load("emoji-64", image_size=16))
    with pytest.raises(ValueError, match="domain_options of unpaired are made, cycle, identity, history, got 'l1'"):
        domain_of(recipe_of(domain_options={"l1": 1}))
    small = UnpairedSet(*(fastgan.data.load("emoji-64", image_size=size, limit=4) for size in (16, 32)))
    with pytest.raises(ValueError, match="must be an UnpairedSet"):
        fastgan.Trainer(recipe_of(), out=tmp_path / "run", images=small)
