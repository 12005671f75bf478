"""The presets: sizes that their sources publish, shapes, initialisation, options and their errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgan import models
from fastgan.functional import gan_loss, gradient_penalty
from fastgan.training.step import mixes_samples

# Parameter counts: published by the sources or derived in each class' docstring.
COUNTS = {
    "mlp-28": (1_510_032, 533_505),
    "dcgan-28": (2_305_472, 212_865),
    "dcgan-64": (3_576_704, 2_765_568),
    "fastgan": (1_100_224, 694_208),
    "sngan-32": (4_276_739, 1_053_825),
    "r3gan": (570_563, 562_560),
    "r3gan-small": (294_595, 286_592),
    "stylegan2-small": (263_987, 288_993),
    "chargan": (282_140, 85_569),
    "wavegan": (476_161, 271_489),
    "sagan-32": (4_276_739 + 81_921, 1_053_825 + 20_481),
    "vit-gan-small": (678_816, 826_369),
    "clip-32": (731_521, 166_625),
}
# Small enough to run in milliseconds, and not the defaults: every option is used.
SMALL = {
    "mlp-28": {"image_size": 8, "channels": 2, "latent": 5, "g_widths": (6, 7), "d_widths": (9,)},
    "dcgan-28": {"image_size": 12, "channels": 3, "latent": 5, "g_width": 4, "d_width": 6, "dropout": 0.1},
    "dcgan-64": {
        **{"image_size": 32, "channels": 1, "latent": 5},
        **{"g_width": 4, "d_width": 6, "d_norm": False, "d_deviation": True, "most": 9},
    },
    "fastgan": {
        "image_size": 16,
        "channels": 1,
        "latent": 5,
        "g_width": 4,
        "d_width": 5,
        "d_norm": True,
        "d_deviation": False,
        "most": 6,
    },
    "sngan-32": {"image_size": 16, "channels": 1, "latent": 5, "g_width": 4, "d_width": 6},
    "r3gan-small": {
        "image_size": 16,
        "channels": 1,
        "latent": 5,
        "g_width": 32,
        "d_width": 16,
        "blocks": 2,
        "group_size": 8,
        "filtered": False,
    },
    "r3gan": {
        **{"image_size": 16, "channels": 1, "latent": 5, "g_width": 16, "d_width": 32},
        **{"blocks": 1, "group_size": 8},
    },
    "stylegan2-small": {
        **{"image_size": 16, "channels": 1, "latent": 5, "g_width": 6, "d_width": 4},
        **{"depth": 3, "mixing": 0.5, "d_deviation": False},
    },
    "sagan-32": {"image_size": 16, "channels": 1, "latent": 5, "g_width": 8, "d_width": 6},
    "vit-gan-small": {
        **{"image_size": 16, "channels": 1, "latent": 5, "g_width": 4},
        **{"d_width": 6, "depth": 2, "heads": 3, "patch": 8},
    },
}
SMALL = {name: {**options, "classes": 0} for name, options in SMALL.items()}  # with labels: test_conditional.py
NO_TANH = ("r3gan", "r3gan-small", "stylegan2-small")  # as their sources
# Models of other samples than single images: options, and the shape of a sample.
OTHERS = {
    "chargan": ({"alphabet": "\nabc", "length": 7, "latent": 5, "width": 6, "blocks": 1}, (4, 7)),
    "wavegan": ({"length": 320, "latent": 5, "g_width": 3, "d_width": 4, "shuffle": 1}, (1, 320)),
    "clip-32": (
        {"image_size": 16, "channels": 3, "frames": 4, "latent": 5, "g_width": 3, "d_width": 4},
        (4, 3, 16, 16),
    ),
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_preset_is_covered_here():
    made = {name: p.build.__module__ for name, p in models.presets().items() if "latent" in models.options(name)}
    assert {name for name, m in made.items() if m.startswith("fastgan.")} == set(COUNTS) == {*SMALL, *OTHERS}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_those_of_the_source(name):
    generator, discriminator = models.build(name)
    assert (count(generator), count(discriminator)) == COUNTS[name]
    assert models.presets()[name].source


@pytest.mark.parametrize("name", SMALL)
def test_shapes_range_and_gradients(name):
    options = SMALL[name]
    assert set(options) == set(models.options(name))
    torch.manual_seed(0)
    generator, discriminator = models.build(name, **options)
    assert (generator.latent, generator.image_size, generator.channels) == (
        options["latent"],
        options["image_size"],
        options["channels"],
    )
    assert generator.per_sample and discriminator.per_sample
    images = generator(torch.randn(3, options["latent"]))
    assert images.shape == (3, options["channels"], options["image_size"], options["image_size"])
    assert images.abs().max() <= 1 or name in NO_TANH
    with torch.no_grad():  # a layer that starts at zero (r3gan) hides those before it
        for parameter in (*generator.parameters(), *discriminator.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    logits = discriminator(generator(torch.randn(3, options["latent"])))
    assert logits.shape == (3,)
    # A weighted sum: the plain sum of a batch-normed layer has no gradient.
    (logits * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    for model in (generator, discriminator):
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", OTHERS)
def test_shapes_and_gradients_of_other_samples(name):
    options, shape = OTHERS[name]
    assert set(options) == set(models.options(name))
    torch.manual_seed(0)
    generator, discriminator = models.build(name, **options)
    made = generator(torch.randn(3, options["latent"]))
    assert made.shape == (3, *shape) and made.abs().max() <= 1
    logits = discriminator(made)
    assert logits.shape == (3,)
    (logits * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    for model in (generator, discriminator):
        assert model.per_sample
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", [*SMALL, *OTHERS])
def test_samples_meet_only_in_batch_norm(name):
    """What `per_sample` promises: in eval mode each sample's output is its own."""
    torch.manual_seed(0)
    options = SMALL[name] if name in SMALL else OTHERS[name][0]
    generator, discriminator = (m.eval() for m in models.build(name, **options))
    z = torch.randn(4, generator.latent)
    with torch.no_grad():
        images = generator(z)
        torch.testing.assert_close(images[1:2], generator(z[1:2]))
        torch.testing.assert_close(discriminator(images)[2:3], discriminator(images[2:3]))


def test_dcgan_takes_latents_with_pixels():
    generator, discriminator = models.build("dcgan-64", image_size=16, latent=3, g_width=2, d_width=2)
    images = generator(torch.randn(2, 3, 1, 1))
    assert images.shape == (2, 3, 16, 16) and discriminator(images).shape == (2,)


FAMILIES = {  # of many sizes, at a width that takes a moment
    "dcgan-64": {"g_width": 2, "d_width": 2, "d_norm": False},
    "r3gan": {"g_width": 16, "d_width": 16, "blocks": 1, "group_size": 8},
    "sngan-32": {"g_width": 2, "d_width": 2},
}


@pytest.mark.parametrize("image_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_sizes_learn_with_r1(name, image_size):
    """The update of both networks: the adversarial loss, and R1 of the discriminator at real images."""
    torch.manual_seed(0)
    options = FAMILIES[name]
    generator, discriminator = models.build(name, image_size=image_size, latent=3, **options)
    with torch.no_grad():  # a layer that starts at zero (r3gan) hides those before it
        for parameter in (*generator.parameters(), *discriminator.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = generator(torch.randn(1, 3))
    assert images.shape == (1, 3, image_size, image_size)
    nn.functional.softplus(-discriminator(images)).mean().backward()
    real, made = torch.rand(1, 3, image_size, image_size) * 2 - 1, images.detach()
    discriminator.zero_grad()
    penalty = gradient_penalty(discriminator, real, kind="r1", weight=10.0)
    assert 0 < penalty < float("inf")
    weights = list(discriminator.parameters())
    of_penalty = torch.autograd.grad(penalty, weights, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in of_penalty if g is not None) > 0
    gan_loss(discriminator(made), discriminator(real), kind="bce", side="d").backward()
    for parameter in (*generator.parameters(), *weights):
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    assert all(g is None or g.isfinite().all() for g in of_penalty)


def test_dcgan_initialisation():
    torch.manual_seed(0)
    for model in models.build("dcgan-64"):
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                assert layer.bias is None
                assert abs(layer.weight.std().item() - 0.02) < 0.002
            elif isinstance(layer, nn.BatchNorm2d):
                assert abs(layer.weight.mean().item() - 1) < 0.02 and layer.weight.std() > 0.01
                assert not layer.bias.any()


def test_keras_initialisation():
    torch.manual_seed(0)
    generator, discriminator = models.build("dcgan-28")
    for layer, fans in (
        (generator.dense[0], 100 + 7 * 7 * 256),
        (generator.main[0], 25 * (256 + 128)),
        (discriminator.main[3], 25 * (64 + 128)),
    ):
        bound = (6 / fans) ** 0.5
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.99 * bound
    assert not discriminator.main[0].bias.any()
    norm = generator.main[1]
    assert (norm.eps, norm.momentum) == (1e-3, 0.01)


def test_keras_padding_is_the_mirror_image_of_same():
    """k5 s2 p2 equals TensorFlow's "same" (pad 1 before, 2 after) on flipped images with flipped kernels."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 5, 2, 2, bias=False)
    x = torch.randn(1, 1, 28, 28)
    same = nn.functional.conv2d(nn.functional.pad(x.flip(2, 3), (1, 2, 1, 2)), conv.weight.flip(2, 3), stride=2)
    torch.testing.assert_close(conv(x), same.flip(2, 3))


def test_channels_last_needs_no_copy():
    generator, discriminator = models.build("dcgan-28", g_width=4, d_width=4)
    seen = {}
    generator.main.register_forward_pre_hook(lambda _, args: seen.update(start=args[0]))
    discriminator.dense.register_forward_pre_hook(lambda _, args: seen.update(flat=args[0]))
    discriminator.main.register_forward_hook(lambda _, args, out: seen.update(last=out))
    discriminator.to(memory_format=torch.channels_last).eval()
    discriminator(generator(torch.randn(2, 100)).contiguous(memory_format=torch.channels_last))
    assert seen["start"].is_contiguous(memory_format=torch.channels_last)
    assert seen["flat"].data_ptr() == seen["last"].data_ptr()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dcgan-65", {}, "there is no model 'dcgan-65', choose one of chargan, clip-32"),
        ("dcgan-64", {"depth": 3}, "dcgan-64 has no option 'depth', it takes image_size"),
        ("dcgan-64", {"image_size": 48}, "power of two of at least 16, got 48"),
        ("dcgan-64", {"image_size": 8}, "power of two of at least 16, got 8"),
        ("dcgan-64", {"g_width": 0}, "width must be a positive integer, got 0"),
        ("dcgan-28", {"image_size": 30}, "multiple of 4, got 30"),
        ("dcgan-28", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("mlp-28", {"g_widths": ()}, "one or more positive integers"),
        ("mlp-28", {"latent": 0}, "must be positive, got 28, 1 and 0"),
    ],
)
def test_errors(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, **overrides)


def test_minibatch_deviation_is_its_formula():
    torch.manual_seed(0)
    x = torch.randn(6, 2, 3, 3, dtype=torch.double)
    found = models.MinibatchDeviation()(x)
    assert torch.equal(found[:, :2], x)
    for n in range(6):  # two groups of three
        group = x[:3] if n < 3 else x[3:]
        want = group.std(0, correction=0).mean()
        assert torch.allclose(found[n, 2], want.expand(3, 3), rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_minibatch_deviation_of_parts_is_that_of_the_whole(parts, monkeypatch):
    layer, x = models.MinibatchDeviation(), torch.randn(16, 2, 3, 3)
    whole = layer(x)
    assert torch.equal(torch.cat([layer(part) for part in x.chunk(parts)]), whole)
    layer.sync = True
    monkeypatch.setattr("fastgan._ranks.size", lambda sync: parts if sync else 1)
    assert torch.equal(torch.cat([layer(part) for part in x.chunk(parts)]), whole)
    words = rf"whole groups of the 4 samples that one process compares in a batch of {6 * parts}, got 6"
    with pytest.raises(ValueError, match=words):
        layer(x[:6])
    assert layer.eval()(x[:6]).shape == (6, 3, 3, 3)  # its batch is that of one process


def test_samples_that_meet_in_a_batch_are_seen():
    _, discriminator = models.build("dcgan-64", image_size=16, d_width=4, d_norm=False, d_deviation=True)
    assert "MinibatchDeviation" in mixes_samples(discriminator)
