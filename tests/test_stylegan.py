"""fastgan.compat.stylegan: signatures, values and derivatives in float64, and what `install` replaces."""

import importlib
import inspect
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from test_upfirdn2d import LONG, ODD, SMOOTH, plain

import fastgan
from fastgan._op import around
from fastgan.compat import stylegan

SIGNATURES = {  # as torch_utils.ops has them: name -> arguments with their defaults
    "bias_act.bias_act": "x b=None dim=1 act='linear' alpha=None gain=None clamp=None impl='cuda'",
    "upfirdn2d.setup_filter": "f device='cpu' normalize=True flip_filter=False gain=1 separable=None",
    "upfirdn2d.upfirdn2d": "x f up=1 down=1 padding=0 flip_filter=False gain=1 impl='cuda'",
    "upfirdn2d.filter2d": "x f padding=0 flip_filter=False gain=1 impl='cuda'",
    "upfirdn2d.upsample2d": "x f up=2 padding=0 flip_filter=False gain=1 impl='cuda'",
    "upfirdn2d.downsample2d": "x f down=2 padding=0 flip_filter=False gain=1 impl='cuda'",
    "conv2d_resample.conv2d_resample": ("x w f=None up=1 down=1 padding=0 groups=1 flip_weight=True flip_filter=False"),
    "filtered_lrelu.filtered_lrelu": (
        "x fu=None fd=None b=None up=1 down=1 padding=0 gain=1.4142135623730951 slope=0.2 clamp=None "
        "flip_filter=False impl='cuda'"
    ),
    "conv2d_gradfix.conv2d": "input weight bias=None stride=1 padding=0 dilation=1 groups=1",
    "conv2d_gradfix.conv_transpose2d": (
        "input weight bias=None stride=1 padding=0 output_padding=0 groups=1 dilation=1"
    ),
    "conv2d_gradfix.no_weight_gradients": "disable=True",
    "fma.fma": "a b c",
    "grid_sample_gradfix.grid_sample": "input grid",
}


OURS = {  # fastgan.functional's: they may grow, never shrink
    "bias_act": "x bias=None activation='leaky_relu' negative_slope=0.2 gain=1.0 clamp=None",
    "upfirdn2d": "x f up=1 down=1 padding=0 flip_filter=False gain=1.0",
    "conv2d_resample": SIGNATURES["conv2d_resample.conv2d_resample"].replace("x w ", "x weight "),
    "filtered_lrelu": (
        "x fu=None fd=None bias=None up=1 down=1 padding=0 gain=1.4142135623730951 negative_slope=0.2 clamp=None "
        "flip_filter=False"
    ),
    "modulated_conv2d": (
        "x weight styles noise=None up=1 down=1 padding=0 resample_filter=None demodulate=True flip_weight=True "
        "eps=1e-08 form='auto'"
    ),
}


def signature(function):
    parameters = inspect.signature(function).parameters.values()
    return " ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    module, _, function = name.partition(".")
    assert signature(getattr(getattr(stylegan, module), function)) == SIGNATURES[name]


@pytest.mark.parametrize("name", OURS)
def test_signatures_of_the_functions(name):
    assert signature(getattr(fastgan.functional, name)).startswith(OURS[name])


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# ---- bias_act --------------------------------------------------------------------------------------------------------

PHI = {
    "linear": (lambda t: t, 1),
    "relu": (F.relu, math.sqrt(2)),
    "lrelu": (lambda t: F.leaky_relu(t, 0.2), math.sqrt(2)),
    "tanh": (torch.tanh, 1),
    "sigmoid": (torch.sigmoid, 1),
    "elu": (F.elu, 1),
    "selu": (F.selu, 1),
    "softplus": (F.softplus, 1),
    "swish": (F.silu, math.sqrt(2)),
}


@pytest.mark.parametrize("act", PHI)
def test_bias_act_has_nine_activations_with_their_gains(act):
    phi, gain = PHI[act]
    kind = stylegan.bias_act.activation_funcs[act]
    assert kind.def_gain == gain and kind.def_alpha == (0.2 if act == "lrelu" else 0)
    x, b = double(3, 4, 5, 2), double(4)
    torch.testing.assert_close(kind.func(x, alpha=0.2), phi(x))
    torch.testing.assert_close(stylegan.bias_act.bias_act(x, b, act=act), gain * phi(x + b.view(1, -1, 1, 1)))
    y = stylegan.bias_act.bias_act(x, act=act, gain=3, clamp=1)
    torch.testing.assert_close(y, (3 * phi(x)).clamp(-1, 1))
    torch.testing.assert_close(stylegan.bias_act.bias_act(x, b, act=act, gain=0), 0 * x)


@pytest.mark.parametrize(("shape", "dim"), [((5,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), -1), ((2, 3, 4, 5), 2)])
def test_bias_act_takes_any_shape_and_dim(shape, dim):
    x, b = double(*shape), double(shape[dim])
    along = [1] * len(shape)
    along[dim] = -1
    want = F.leaky_relu(x + b.view(along), 0.3) * 0.5
    y = stylegan.bias_act.bias_act(x, b, dim=dim, act="lrelu", alpha=0.3, gain=0.5)
    torch.testing.assert_close(y, want)
    for got, wanted in zip(torch.autograd.grad(y.sum(), (x, b)), torch.autograd.grad(want.sum(), (x, b)), strict=True):
        torch.testing.assert_close(got, wanted)
    assert stylegan.bias_act.bias_act(x).shape == x.shape


# ---- filters ---------------------------------------------------------------------------------------------------------


def test_setup_filter():
    setup = stylegan.upfirdn2d.setup_filter
    assert torch.equal(setup([1, 3, 3, 1]), torch.outer(SMOOTH, SMOOTH))
    assert setup([1] * 8).shape == (8,) and setup([1, 2], separable=True).shape == (2,)
    assert setup(None).tolist() == [[1.0]] and setup(2, normalize=False).tolist() == [[4.0]]
    torch.testing.assert_close(setup(ODD, flip_filter=True, gain=3), 3 * ODD.flip([0, 1]) / ODD.sum())
    torch.testing.assert_close(setup([1, 3], separable=True, gain=4), torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="setup_filter: f must have at most 2 dimensions"):
        setup(torch.ones(1, 2, 3))


@pytest.mark.parametrize("f", [SMOOTH, LONG, ODD], ids=["4", "12", "2-D"])
def test_filters_stay_centred(f):
    x, (kh, kw) = double(2, 3, 9, 7), (f.shape[0], f.shape[-1])
    want = plain(f, 1, 1, (kw // 2, (kw - 1) // 2, kh // 2, (kh - 1) // 2), False, 1.0)(x)
    torch.testing.assert_close(stylegan.upfirdn2d.filter2d(x, f), want)
    around = (kw + 1) // 2 + 1, (kw - 2) // 2 + 1, (kh + 1) // 2 - 2, (kh - 2) // 2 - 2
    y = stylegan.upfirdn2d.upsample2d(x, f, padding=[1, -2], gain=0.5, flip_filter=True)
    torch.testing.assert_close(y, plain(f, 2, 1, around, True, 2.0)(x))
    around = (kw - 1) // 2, (kw - 2) // 2, (kh - 1) // 2, (kh - 2) // 2
    torch.testing.assert_close(stylegan.upfirdn2d.downsample2d(x, f), plain(f, 1, 2, around, False, 1.0)(x))
    if kh % 2 == 0 and kw % 2 == 0:
        assert stylegan.upfirdn2d.upsample2d(x, f).shape == (2, 3, 18, 14)


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_fma_and_grid_sample_are_torchs():
    a, b, c = double(2, 3, 1), double(3, 4), double(2, 1, 1)
    torch.testing.assert_close(stylegan.fma.fma(a, b, c), a * b + c)
    assert torch.autograd.gradgradcheck(stylegan.fma.fma, (a, b, c))
    x, grid = double(2, 3, 5, 4), (torch.rand(2, 6, 3, 2, dtype=torch.float64) * 2.4 - 1.2).requires_grad_()
    sample = stylegan.grid_sample_gradfix.grid_sample
    torch.testing.assert_close(sample(x, grid), F.grid_sample(x, grid, align_corners=False))
    assert torch.autograd.gradcheck(sample, (x, grid))
    assert torch.autograd.gradgradcheck(lambda x: sample(x, grid.detach()).square(), (x,))  # torch has no such order
    (dgrid,) = torch.autograd.grad(sample(x, grid).sum(), grid, create_graph=True)
    with pytest.raises(NotImplementedError, match="grid_sample: a second derivative must be of the image"):
        torch.autograd.grad(dgrid.sum(), x)


@pytest.mark.parametrize("transposed", [False, True])
def test_no_weight_gradients_skips_them(transposed):
    """The kernel does not run, the graph says None, and R1's gradient of the weight is whole."""
    gradfix = stylegan.conv2d_gradfix
    conv = gradfix.conv_transpose2d if transposed else gradfix.conv2d
    x, w = double(2, 3, 6, 6), double(3, 3, 3, 3)
    ran = []

    def seen(op, launch):
        ran.append(op.name)
        return launch

    def penalty(x, w):
        with gradfix.no_weight_gradients():
            found = torch.autograd.grad(
                conv(x, w, padding=1).square().sum(), (x, w), create_graph=True, allow_unused=True
            )
        assert found[1] is None
        return found[0].square().sum()

    with around(seen):
        r1 = penalty(x, w)
    assert "conv2d_weight" not in ran
    (got,) = torch.autograd.grad(r1, w)
    plainly = (F.conv_transpose2d if transposed else F.conv2d)(x, w, padding=1)
    (dx,) = torch.autograd.grad(plainly.square().sum(), x, create_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(dx.square().sum(), w)[0])
    with gradfix.no_weight_gradients(False):
        assert not gradfix.weight_gradients_disabled
        assert torch.autograd.grad(conv(x, w).sum(), w)[0] is not None
    assert torch.autograd.grad(conv(x, w).sum(), w)[0] is not None


def test_the_flag_of_weight_gradients_is_read_and_set(modules):
    """As the projects' module has it; a module that was imported before tells and sets the same."""
    gradfix, x, w = stylegan.conv2d_gradfix, double(1, 2, 4, 4), double(2, 2, 3, 3)
    theirs = types.ModuleType("torch_utils.ops.conv2d_gradfix")
    theirs.enabled, theirs.weight_gradients_disabled, theirs.conv2d = False, False, None
    sys.modules[theirs.__name__] = theirs
    stylegan.install()
    for flag, other in ((gradfix, theirs), (theirs, gradfix)):
        assert flag.weight_gradients_disabled is False
        with gradfix.no_weight_gradients():
            assert flag.weight_gradients_disabled is True
            with gradfix.no_weight_gradients():
                pass
            assert flag.weight_gradients_disabled is True
        assert flag.weight_gradients_disabled is False
        try:
            flag.weight_gradients_disabled = True
            assert other.weight_gradients_disabled is True
            y = gradfix.conv2d(x, w).sum()
            assert torch.autograd.grad(y, w, allow_unused=True)[0] is None
        finally:
            flag.weight_gradients_disabled = False
        assert torch.autograd.grad(gradfix.conv2d(x, w).sum(), w)[0] is not None


def test_bad_arguments_are_told_in_one_sentence_of_the_function_that_was_called():
    x, w, resample = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3), stylegan.conv2d_resample.conv2d_resample
    up, wrong = stylegan.upfirdn2d, torch.randn(6, 5, 3, 3)
    channels = r"conv2d_resample: x must have weight.shape\[1\] \* groups channels .* got x \(2, 4, 8, 8\), weight "
    for call, error, text in [
        (lambda: resample(x, wrong), ValueError, channels + r"\(6, 5, 3, 3\), groups=1"),
        (lambda: resample(x, wrong, SMOOTH, up=2), ValueError, channels + r"\(6, 5, 3, 3\), groups=1"),
        (lambda: resample(x, wrong, SMOOTH, down=2), ValueError, channels + r"\(6, 5, 3, 3\), groups=1"),
        (lambda: resample(x, wrong[:, :2], up=2, groups=3), ValueError, channels + r"\(6, 2, 3, 3\), groups=3"),
        (lambda: resample(x, w[:5, :2], up=2, groups=2), ValueError, channels + r"\(5, 2, 3, 3\), groups=2"),
        (lambda: resample(x, w, up=2, groups=0), ValueError, channels + r"\(6, 4, 3, 3\), groups=0"),
        (lambda: resample(x, w, padding=1.5), ValueError, "conv2d_resample: padding must be .* got 1.5"),
        (
            lambda: resample(x, w, [1, 3, 3, 1], up=2),
            TypeError,
            "conv2d_resample: f must be None or a tensor, got list",
        ),
        (lambda: up.filter2d(x, [1, 3, 3, 1]), TypeError, "filter2d: f must be None or a tensor, got list"),
        (lambda: up.upsample2d(x, SMOOTH, 1.9), ValueError, "upsample2d: up must be an int .* got 1.9"),
        (lambda: up.downsample2d(x, SMOOTH, 1.9), ValueError, "downsample2d: down must be an int .* got 1.9"),
        (lambda: up._parse_padding(torch.tensor([1, 1])), ValueError, "upfirdn2d: padding must be an int"),
        (lambda: up._get_filter_size([1, 2]), TypeError, "upfirdn2d: f must be None or a tensor, got list"),
        (lambda: stylegan.filtered_lrelu.filtered_lrelu(x, [1]), TypeError, "filtered_lrelu: fu must be None or a te"),
        (lambda: stylegan.conv2d_gradfix.conv2d(x, w, stride=1.5), ValueError, "conv2d: stride must be an int .* 1.5"),
    ]:
        with pytest.raises(error, match="^" + text):
            call()
    assert up.upfirdn2d(x, SMOOTH, up=(2, 1), padding=[1, 2]).shape == (2, 4, 9, 15)
    assert up.upfirdn2d(x, SMOOTH, up=torch.tensor(2), padding=torch.Size([1, 2])).shape == (2, 4, 17, 15)


# ---- install ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def modules():
    """sys.modules and sys.path as they were; within, no project's ops are there, nor ours in their place."""
    before, path = dict(sys.modules), list(sys.path)
    for name in before:
        if name.split(".")[0] in ("torch_utils", "network"):
            del sys.modules[name]
    yield
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)
    sys.path[:] = path


NETWORK = """
import torch
from torch_utils.ops import bias_act, upfirdn2d

class Network(torch.nn.Module):
    def forward(self, x):
        return bias_act.bias_act(upfirdn2d.upsample2d(x, upfirdn2d.setup_filter([1, 3, 3, 1])), act="lrelu")
"""


@pytest.fixture
def project(modules, tmp_path):
    """A project with ops of its own, which cannot be built."""
    ops = tmp_path / "torch_utils" / "ops"
    ops.mkdir(parents=True)
    for folder in (tmp_path / "torch_utils", ops):
        (folder / "__init__.py").write_text("")
    broken = "def {name}(*args, **kwargs):\n    raise RuntimeError('nvcc was not found')\n"
    (ops / "bias_act.py").write_text(broken.format(name="bias_act"))
    names = ("setup_filter", "upfirdn2d", "upsample2d")
    (ops / "upfirdn2d.py").write_text("".join(broken.format(name=name) for name in names))
    (tmp_path / "network.py").write_text(NETWORK)
    sys.path.insert(0, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("imported_before", [False, True])
def test_install_takes_the_place_of_a_projects_ops(project, imported_before):
    network = importlib.import_module("network") if imported_before else None
    done = fastgan.compat.stylegan.install()
    network = network or importlib.import_module("network")
    x = torch.randn(1, 2, 4, 4)
    assert network.Network()(x).shape == (1, 2, 8, 8)
    assert sys.modules["torch_utils.ops.fma"] is stylegan.fma and "torch_utils.ops.bias_act" in done.modules
    changed = ("torch_utils.ops.bias_act.bias_act", "torch_utils.ops.upfirdn2d.setup_filter")
    assert set(changed) <= set(done.functions) if imported_before else done.functions == ()
    assert "in the place of: torch_utils.ops.bias_act" in str(done)
    assert ("imported before: torch_utils.ops.bias_act.bias_act" in str(done)) == imported_before
    assert fastgan.compat.stylegan.install().functions == ()  # twice: nothing is left to change


def test_a_pickled_networks_source_finds_the_ops(modules):
    """torch_utils.persistence runs the source in a fresh module; where no project is on the path, too."""
    fastgan.compat.stylegan.install()
    module = types.ModuleType("_imported_module_1")
    exec(NETWORK, module.__dict__)
    assert module.Network()(torch.randn(1, 2, 4, 4)).shape == (1, 2, 8, 8)


def test_truncation_draws_styles_towards_their_mean():
    """At 1 the generator is itself; a half halves every style's distance from its class's mean."""
    from fastgan import models
    from fastgan.domains import domain_of
    from fastgan.training.recipes import recipes

    g, _ = models.build("stylegan2-small", image_size=16, channels=1, latent=4, g_width=8, d_width=8, classes=3)
    g.eval()
    z, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(g.truncated(1.0)(z, labels), g(z, labels))
    means = torch.stack([g.mapping(torch.randn(4096, 4), torch.full((4096,), k)).mean(0) for k in range(3)])
    cut = g.truncated(0.5)
    torch.testing.assert_close(cut.mean, means, rtol=0.1, atol=0.05)
    w = g.styles(z, labels)
    torch.testing.assert_close(cut(z, labels), g.synthesise((w + cut.mean[labels][:, None]) / 2))
    with pytest.raises(ValueError, match="truncated: strength must be positive and finite, got 0"):
        g.truncated(0.0)
    recipe = recipes()["stylegan2-small"].replace(latent=4, image_size=16, channels=1)
    plain, _ = models.build("stylegan2-small", image_size=16, channels=1, latent=4, g_width=8, d_width=8)
    sample = lambda t: domain_of(recipe).sample(plain, {"recipe": {}}, 64, seed=0, truncation=t)[0]
    spread = [sample(t).std(0).mean() for t in (None, 0.5, 1e-6)]
    assert spread[0] > 1.2 * spread[1] > 1e3 * spread[2]
