"""Every named recipe trains at reduced width: twenty steps, finite losses, moving samples."""

import pytest
import torch

import fastgan
from fastgan.functional.losses import KINDS
from fastgan.training.recipes import recipes

NARROW = {
    "mlp-28": {},
    "dcgan-28": {"g_width": 8, "d_width": 8},
    "fastgan": {"g_width": 8, "d_width": 8},
    "dcgan-64": {"g_width": 8, "d_width": 8},
    "sngan-32": {"g_width": 16, "d_width": 16},
    "cyclegan": {"g_width": 4, "d_width": 4, "blocks": 1},
    "pix2pix": {"g_width": 4, "d_width": 4},
    "r3gan": {"g_width": 16, "d_width": 16},
    "r3gan-small": {"g_width": 32, "d_width": 32},
    "stylegan2-small": {"g_width": 8, "d_width": 8},
    "chargan": {"width": 8, "blocks": 1},
    "wavegan": {"g_width": 4, "d_width": 4},
    "hifigan-small": {"g_width": 8, "d_width": 4},
    "sagan-32": {"g_width": 8, "d_width": 8},
    "vit-gan-small": {"g_width": 8, "d_width": 16, "depth": 2},
    "clip-32": {"g_width": 4, "d_width": 4},
}
SHORT = {"wavegan": {"length": 256}, "hifigan-small": {"length": 512}}


@pytest.mark.parametrize("name", recipes())
def test_twenty_steps(name, tmp_path):
    recipe = recipes()[name]
    options = {**recipe.model_options, **NARROW[recipe.model]}
    recipe = recipe.replace(
        domain_options=SHORT.get(name, {}),
        model_options=options,
        batch_size=8,
        steps=20,
        log_every=10,
        sample_every=0,
        sample_count=4,
        checkpoint_every=0,
    )
    trainer = fastgan.Trainer(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    before = [p.detach().clone() for p in trainer.generator.parameters()]
    result = trainer.fit()
    assert result.step == 20 and result.reason == "steps"
    assert all(torch.tensor(v).isfinite() for v in result.metrics.values())
    assert ("penalty" in result.metrics) == (recipe.penalty is not None)
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.generator.parameters(), strict=True))


@pytest.mark.parametrize("loss", KINDS)
def test_every_loss_of_the_step_is_a_recipe_s(loss):
    assert recipes()["dcgan-28"].with_settings([f"loss={loss}"]).loss == loss
