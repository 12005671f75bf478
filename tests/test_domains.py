"""Domains: one that a user adds trains, resumes, reports and samples as images do."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fastgan
from fastgan.cli import main
from fastgan.data import TensorSet
from fastgan.domains import Domain, domain_of, domains, register
from fastgan.models import Preset
from fastgan.training.rundir import read_log


# ---- a whole domain: numbers from a mixture of three normal distributions ----
@register
class Mixture(Domain):
    name, noun, shape = "mixture", "numbers", (1,)
    metrics, charts, options = ("wd",), {"Distance": {"wd": "Wasserstein"}}, {"modes": 3}

    def load(self, device):
        rng = torch.Generator().manual_seed(0)
        centres = torch.linspace(-0.6, 0.6, self.option["modes"])
        values = centres[torch.randint(len(centres), (2000, 1), generator=rng)]
        return TensorSet(values + 0.05 * torch.randn(2000, 1, generator=rng), name="mixture", device=device)

    def pictures(self, made):
        counts = torch.histc(made.clamp(-1, 1), 32, -1, 1)
        heights = 32 * counts / counts.max()
        return torch.where(torch.arange(32.0).flip(0)[:, None] < heights, 1.0, -1.0)[None, None]

    def judge(self, samples):
        return Distance(samples.values)


class Distance:
    metric, words, identity, batch = "wd", "Wasserstein distance", "all numbers", 64

    def __init__(self, values):
        self.real, self.available = values, len(values)

    def make(self, generator, count):
        return fastgan.training.sampling.draw(generator, torch.linspace(-2, 2, count)[:, None])

    def score(self, made, count):
        levels = torch.linspace(0.01, 0.99, 99)
        distance = (made.flatten().quantile(levels) - self.real.flatten().quantile(levels)).abs().mean()
        return {"wd": float(distance)} if made.isfinite().all() else {}


def mlp(latent=1, width=16):
    layers = lambda *end: nn.Sequential(nn.Linear(1, width), nn.LeakyReLU(0.2), nn.Linear(width, 1), *end)
    return layers(), layers(nn.Flatten(0))


fastgan.models.register(Preset("mixture", mlp, "this test"))
# ---- its end ----

RECIPE = fastgan.Recipe(
    name="mixture",
    model="mixture",
    domain="mixture",
    data="mixture",
    latent=1,
    batch_size=32,
    steps=6,
    loss="lsgan",
    eval_every=3,
    log_every=1,
    sample_count=50,
    checkpoint_every=3,
    g_lr=1e-2,
    d_lr=1e-2,
)


def test_the_toy_domain_is_small():
    lines = Path(__file__).read_text().split("# ---- a whole domain")[1].split("# ---- its end")[0].splitlines()
    assert len(lines) < 60


def test_a_new_domain_trains_reports_and_samples(tmp_path, capsys):
    run = tmp_path / "run"
    result = fastgan.Trainer(RECIPE, out=run, quiet=True).fit()
    assert result.reason == "steps"
    records = read_log(run / "log.jsonl")
    assert [r["step"] for r in records if "wd" in r] == [3, 6] and all("images" in r for r in records)
    page = (run / "report.html").read_text()
    assert "mixture on" in page and "<h2>Distance</h2>" in page and "best Wasserstein distance" in page
    assert len(list((run / "samples").glob("*.png"))) == 2  # the first and the last
    assert main(["sample", "--run", str(run), "--n", "9", "--out", str(tmp_path / "grid.png"), "--best"]) == 0
    assert "9 samples" in capsys.readouterr().out and (tmp_path / "grid.png").stat().st_size > 0


@pytest.mark.usefixtures("unraced")
def test_a_new_domain_resumes_bit_for_bit(tmp_path):
    whole = fastgan.Trainer(RECIPE, out=tmp_path / "whole", quiet=True)
    whole.fit()
    fastgan.Trainer(RECIPE.replace(steps=2), out=tmp_path / "parts", quiet=True).fit()
    parts = fastgan.Trainer(RECIPE, resume=tmp_path / "parts", quiet=True)
    parts.fit()
    for a, b in zip(whole.generator.parameters(), parts.generator.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.noise, parts.noise) and parts.step == 6


def test_a_new_domain_learns(tmp_path):
    run = fastgan.Trainer(RECIPE.replace(steps=300, eval_every=100, log_every=100), out=tmp_path / "run", quiet=True)
    run.fit()
    first = Distance(run.images.values)
    untrained = first.score(first.make(mlp()[0], 500), 500)["wd"]
    assert run.evaluation.best < 0.5 * untrained


def test_domains_are_known_by_name():
    assert {"images", "mixture"} <= set(domains())
    assert domain_of(fastgan.recipes()["dcgan-28"]).shape == (1, 28, 28)
    assert domain_of(RECIPE.with_settings(["domain_options.modes=5"])).option["modes"] == 5
    with pytest.raises(ValueError, match=r"domain must be one of images, .*, got 'smells'"):
        domain_of(RECIPE.replace(domain="smells"))
    with pytest.raises(ValueError, match=r"domain_options of mixture are modes, got 'nodes'"):
        domain_of(RECIPE.replace(domain_options={"nodes": 5}))


def test_a_target_names_the_domains_own_metrics(tmp_path):
    with pytest.raises(ValueError, match="with one of wd, got 'kcd<1'"):
        fastgan.Trainer(RECIPE, out=tmp_path / "run", target="kcd<1")
    run = fastgan.Trainer(RECIPE, out=tmp_path / "run", target="wd<100", quiet=True)
    assert run.fit().reason == "target" and run.step == 3


def test_samples_that_are_none():
    for values in (torch.zeros(3), torch.zeros(3, 1, dtype=torch.long), torch.full((3, 1), torch.nan)):
        with pytest.raises(ValueError, match="TensorSet: values must be finite floats"):
            TensorSet(values)
    with pytest.raises(ValueError, match="labels must be integers"):
        TensorSet(torch.zeros(3, 1), torch.zeros(2, dtype=torch.long))


OPTIONS = [(recipe.name, key) for recipe in fastgan.recipes().values() for key in domain_of(recipe).options]


@pytest.mark.parametrize(
    ("name", "key"), sorted({(domain_of(fastgan.recipes()[n]).name, k): (n, k) for n, k in OPTIONS}.values())
)
def test_every_option_refuses_what_it_cannot_be(name, key):
    """A sentence that names it, for a wrong type, a number below the least and one beyond all bounds."""
    domain = domain_of(fastgan.recipes()[name])
    wrong = {
        bool: ["yes", 1],
        int: [domain.least.get(key, 0) - 1, 1.5, "x", None, True, 1 << 25],
        float: [-1, -0.5, float("nan"), float("inf"), "x", None],
        str: [3, None],
        tuple: [3, "x", ()],
    }[type(domain.options[key])]
    for value in wrong:
        with pytest.raises(ValueError, match=f"domain_options.{key} must be "):
            domain_of(domain.recipe.replace(domain_options={**domain.recipe.domain_options, key: value}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pix2pix", {"source_channels": 2}, "source_channels must be 0, 1 or 3, got 2"),
        ("hifigan-small", {"bands": 200, "resolutions": (1.0,)}, "bands must be at most twice the hop, 128, got 200"),
        ("hifigan-small", {"resolutions": (1e9,)}, "a resolution must be at most 64, got 1000000000.0"),
    ],
)
def test_options_that_do_not_fit_together(name, options, message):
    recipe = fastgan.recipes()[name]
    with pytest.raises(ValueError, match=message):
        domain_of(recipe.replace(domain_options=recipe.domain_options | options))
